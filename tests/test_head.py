"""A classifier's head: what begins anew, what begins as the checkpoint has it, what is exported."""

from pathlib import Path

import pytest
import torch
from bases import random_serving_tree, start_of
from models_on_disk import SIZES, edit_weights, saved
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

import fedalt
from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Plan, Slot, Sum, single
from fedalt.core.tree import Name
from fedalt.data.examples import Example
from fedalt.evaluation import Scoring, score, score_together
from fedalt.export.folders import export_individual, export_personal
from fedalt.methods.contract import Serving
from fedalt.models.base import Base, ModelError, load_base

LABELS = ("bad", "fair", "good")
PLAN = single(Slot("individual", 2, 4.0))
IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [9, 5, 9, 5, 7, 2]])


def classifier(folder: Path, labels: tuple[str, ...]) -> Path:
    config = LlamaConfig(**SIZES, id2label=dict(enumerate(labels)))
    return saved(folder, LlamaForSequenceClassification, config)


def head_of(base: Base) -> dict[Name, Tensor]:
    return Initializer(base.adapted.sites, base.adapted.heads, 0, given=base.given).head()


def test_a_head_of_another_number_of_labels_begins_anew_and_is_told(tmp_path: Path) -> None:
    base = load_base(str(classifier(tmp_path / "m", ("a", "b"))), labels=LABELS, device="cpu")
    assert base.notes == (
        "the checkpoint's own head, for the labels a, b, is not used: a new one for bad, fair, "
        "good is trained",
    )
    weight = Name("score", HEAD, "weight")
    assert torch.equal(head_of(base)[weight], start_of(base).head()[weight])
    assert head_of(base)[weight].shape == (3, 32)


def test_a_head_for_the_same_labels_goes_on_in_the_order_of_the_data(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "m", ("good", "bad", "fair"))
    own = LlamaForSequenceClassification.from_pretrained(folder).score.weight
    base = load_base(str(folder), labels=LABELS, device="cpu")
    assert base.notes == (
        "the head begins as the checkpoint's own, for the labels bad, fair, good",
    )
    assert torch.equal(head_of(base)[Name("score", HEAD, "weight")], own[[1, 2, 0]])
    then = base.fingerprint
    edit_weights(folder, lambda each: {**each, "score.weight": each["score.weight"] * 2})
    assert load_base(str(folder), labels=LABELS, device="cpu").fingerprint != then


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "config", "heads"),
    [
        (DistilBertForMaskedLM, DistilBertConfig, {"pre_classifier", "classifier"}),
        (RobertaForMaskedLM, RobertaConfig, {"classifier.dense", "classifier.out_proj"}),
        (BertForMaskedLM, BertConfig, {"bert.pooler.dense", "classifier"}),
    ],
    ids=["distilbert", "roberta", "bert without a pooler"],
)
def test_layers_that_the_checkpoint_lacks_are_trained_and_exported(
    kind: type, config: type, heads: set[str], tmp_path: Path
) -> None:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    base = load_base(
        str(saved(tmp_path / "m", kind, config(**{**SIZES, **sizes}))),
        labels=LABELS,
        targets="all-linear",
        device="cpu",
    )
    assert {name.site for name in base.adapted.heads} == heads
    serving = Serving(PLAN, random_serving_tree(base, PLAN))
    with base.adapted.bound(serving.plan, serving.tree) as bound:
        wanted = bound(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    export_personal(serving, base, tmp_path / "whole")
    export_individual(serving, base, tmp_path / "lora")
    torch.manual_seed(7)
    model = fedalt.load(tmp_path / "whole", device="cpu")
    found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3)
    lora = PeftModel.from_pretrained(plain, str(tmp_path / "lora")).eval()
    found = lora(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_other_random_layers_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", BertForSequenceClassification, BertConfig(**SIZES))
    missing = "bert.encoder.layer.1.attention.self.query.weight"
    edit_weights(folder, lambda each: {k: v for k, v in each.items() if k != missing})
    with pytest.raises(ModelError, match=f"lacks 1 tensor, first {missing}"):
        load_base(str(folder), labels=LABELS, device="cpu")


def test_clients_of_a_layer_that_also_sees_positions_are_scored_as_alone(tmp_path: Path) -> None:
    """DeBERTa's query and key layers see the table of positions, too, which is no client's."""
    config = DebertaV2Config(
        **SIZES,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    )
    folder = saved(tmp_path / "m", DebertaV2ForSequenceClassification, config)
    base = load_base(str(folder), labels=LABELS, device="cpu")
    assert not base.adapted.shares_passes
    servings = [Serving(PLAN, random_serving_tree(base, PLAN, seed)) for seed in (1, 2)]
    examples = [Example(tuple(ids), len(ids), "bad", LABELS, label=0) for ids in IDS.tolist()]
    scoring = Scoring(batch_size=2)
    together = score_together(base, [(each, examples) for each in servings], scoring)
    for serving, found in zip(servings, together, strict=True):
        assert found.losses == pytest.approx(score(base, serving, examples, scoring).losses)
    both = {name: torch.stack([each.tree[name] for each in servings]) for name in servings[0].tree}
    plan = Plan(PLAN.slots, Sum((1.0,)))
    with (
        pytest.raises(ValueError, match="clients cannot share a pass"),
        base.adapted.bound(plan, both),
    ):
        pass
