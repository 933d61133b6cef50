"""A classifier's loss of a text is the text's own: whatever it is padded with, and of pairs."""

import itertools

import pytest
import torch
from bases import base_of, random_serving_tree
from tiny import CAUSAL, LABELS, VOCAB, _seeded, bert_classifier, llama_classifier
from tiny import roberta_classifier as roberta
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from fedalt.adapters.plan import Slot, single
from fedalt.data.examples import Example
from fedalt.data.prompts import Template, encode
from fedalt.data.records import LabeledText
from fedalt.evaluation import Scoring, score
from fedalt.methods.contract import Serving
from fedalt.training.batches import collate
from fedalt.training.group import Share, Training
from fedalt.training.loop import train_together
from fedalt.training.loss import token_losses
from fedalt.training.orders import Fit

PLAN = single(Slot("individual", 2, 4))
NAMES = ("0", "1", "2")


def gpt2():
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        num_labels=LABELS,
        pad_token_id=0,
        eos_token_id=2,
    )
    return _seeded(GPT2ForSequenceClassification, config)


# What texts end with is, in turn, the model's padding id, the tokenizer's, and neither.
TEXTS = [(5, 6, 0), (7, 8, 9, 10, 11, 12, 2), (4,), (3, 0, 0), tuple(range(3, 40)), (2, 2)]
EXAMPLES = [
    Example(ids, len(ids), str(at % LABELS), NAMES, at % LABELS) for at, ids in enumerate(TEXTS)
]


def serving_of(base):
    return Serving(PLAN, random_serving_tree(base, PLAN))


@pytest.mark.parametrize(("model_pads", "tokenizer_pads"), [(0, "</s>"), (2, "<pad>"), (2, "</s>")])
@pytest.mark.parametrize("model", [llama_classifier, gpt2, bert_classifier, roberta])
def test_a_text_does_not_depend_on_its_neighbours(model, model_pads, tokenizer_pads):
    base = base_of(model())
    base.adapted.model.config.pad_token_id = model_pads
    base.tokenizer.pad_token = tokenizer_pads
    serving = serving_of(base)
    together = score(base, serving, EXAMPLES, Scoring(batch_size=6)).losses
    pairs = [score(base, serving, EXAMPLES[at : at + 2], Scoring()).losses for at in (0, 2, 4)]
    alone = [score(base, serving, [each], Scoring()).losses[0] for each in EXAMPLES]
    assert together == pytest.approx(alone, abs=1e-5)
    assert [*itertools.chain(*pairs)] == pytest.approx(alone, abs=1e-5)
    with base.adapted.bound(serving.plan, serving.tree) as bound, torch.no_grad():
        trained = token_losses(bound, collate([EXAMPLES], base.pad_id, torch.device("cpu")))
    assert trained.tolist() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("model", [llama_classifier, gpt2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_the_last_that_the_mask_shows(model, side):
    base = base_of(model())
    base.adapted.model.config.pad_token_id = 2
    ids, mask = torch.full((2, 7), 5), torch.zeros(2, 7, dtype=torch.long)
    for row, text in enumerate(TEXTS[:2]):
        where = slice(0, len(text)) if side == "right" else slice(7 - len(text), 7)
        ids[row, where], mask[row, where] = torch.tensor(text), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = base.adapted.model(
            ids, attention_mask=mask, position_ids=positions, labels=torch.tensor([0, 1])
        )
        for row, text in enumerate(TEXTS[:2]):
            lone = base.adapted.model(torch.tensor([text])).logits[0]
            torch.testing.assert_close(padded.logits[row], lone, atol=1e-5, rtol=1e-5)
    wanted = functional.cross_entropy(padded.logits, torch.tensor([0, 1]))
    torch.testing.assert_close(padded.loss, wanted)


@pytest.mark.parametrize("name", CAUSAL)
def test_an_answers_loss_depends_on_neither_batch_nor_packing(name):
    base = base_of(CAUSAL[name]())
    serving = serving_of(base)
    base.adapted.model.config.pad_token_id = 2
    examples = [
        Example((*range(3, 3 + length), *range(20, 20 + answer), 2), length, "a")
        for length, answer in ((1, 4), (9, 2), (30, 1), (4, 0))
    ]
    device = torch.device("cpu")
    alone, together = [], {}
    with base.adapted.bound(serving.plan, serving.tree) as model, torch.no_grad():
        for each in examples:
            logits = model(torch.tensor([each.ids])).logits[0, each.answer_start - 1 : -1]
            wanted = torch.tensor(each.ids[each.answer_start :])
            alone += functional.cross_entropy(logits, wanted, reduction="none").tolist()
    for pack in {False, base.adapted.packs.longest > 0}:
        batch = collate([examples], base.pad_id, device, pack=pack)
        with (
            base.adapted.bound(serving.plan, serving.tree, packing=batch.packing) as model,
            torch.no_grad(),
        ):
            together[pack] = token_losses(model, batch).tolist()
    for losses in together.values():
        assert losses == pytest.approx(alone, abs=1e-4)


def paired():
    """A tokenizer that puts pairs as BERT's does."""
    inner = Tokenizer(models.WordLevel({f"w{at}": at for at in range(VOCAB)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="w1 $A w2", pair="w1 $A w2 $B:1 w2:1", special_tokens=[("w1", 1), ("w2", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="w0",
        cls_token="w1",
        sep_token="w2",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bert():
    model = bert_classifier()
    with torch.no_grad():  # so that it matters which text of a pair a token belongs to
        model.bert.embeddings.token_type_embeddings.weight.mul_(20)
    return model


PAIRS = [
    LabeledText("w5 w6 w7", "w8", "1"),
    LabeledText("w9", "w10 w11 w12 w13 w14", "2"),
    LabeledText("w9 w9", None, "0"),
]


def encoded(record, max_length=50):
    return encode(record, paired(), Template(), max_length=max_length, labels=NAMES).example


def plain_losses(base, serving, records):
    """What transformers makes of the tokenizer's whole output."""
    found = []
    with base.adapted.bound(serving.plan, serving.tree) as model, torch.no_grad():
        for each in records:
            given = paired()(each.text, each.pair, return_tensors="pt")
            wanted = torch.tensor([NAMES.index(each.answer)])
            found.append(float(functional.cross_entropy(model(**given).logits, wanted)))
    return found


@pytest.mark.parametrize("model", [bert, gpt2])
def test_pairs_keep_their_segments_in_scores_and_in_training(model):
    base = base_of(model())
    serving = serving_of(base)
    examples = [encoded(each) for each in PAIRS]
    wanted = plain_losses(base, serving, PAIRS)
    assert score(base, serving, examples, Scoring()).losses == pytest.approx(wanted, abs=1e-5)
    order = Fit(PLAN, serving.tree, frozenset(serving.tree))
    training = Training(lr=1e-9, batch_size=3)
    (trained,) = train_together(base, [Share(order, examples, 0)], training)
    assert trained.loss == pytest.approx(sum(wanted) / 3, abs=1e-5)


def test_a_model_without_segments_is_told_none():
    base = base_of(llama_classifier())
    serving = serving_of(base)
    without = [
        Example(each.ids, len(each.ids), each.answer, NAMES, each.label)
        for each in map(encoded, PAIRS)
    ]
    one, other = (
        score(base, serving, examples, Scoring()).losses
        for examples in (without, [encoded(each) for each in PAIRS])
    )
    assert one == other


def test_a_pair_too_long_loses_of_its_longer_text():
    record = LabeledText("w5 " * 30, "w6 w7", "1")
    example = encoded(record, max_length=12)
    assert (len(example.ids), len(example.segments)) == (12, 12)
    assert example.ids[-3:] == (6, 7, 2)
    assert example.segments == (0,) * 9 + (1,) * 3
