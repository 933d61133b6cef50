"""Scores: answer loss, accuracy over options, generated text, against the plainest computation."""

from dataclasses import replace

import pytest
import torch
from bases import base_of, example, random_serving_tree
from tiny import CAUSAL, CLASSIFIERS
from torch.nn import functional

from fedalt.adapters.plan import Slot, single
from fedalt.data.examples import Example
from fedalt.evaluation import Scoring, generate, score
from fedalt.methods.contract import Serving
from fedalt.metrics import text_metrics

PLAN = single(Slot("individual", 2, 4))
EXAMPLES = [
    example("which", "ab", ("cd", "ab", "e")),
    example("and which of these", "q", ("q", "rrr")),
    example("free text", "anything"),
    example("not listed", "zz", ("a", "b")),
]
QUICK = Scoring(batch_size=3, max_new_tokens=6)


def serving_of(base, seed=0):
    return Serving(PLAN, random_serving_tree(base, PLAN, seed))


def nll(base, serving, ids, start):
    with base.adapted.bound(serving.plan, serving.tree) as model, torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return functional.cross_entropy(
        logits[start - 1 : len(ids) - 1], torch.tensor(ids[start:]), reduction="none"
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_and_accuracy_equal_the_plain_computation(name):
    base = base_of(CAUSAL[name]())
    serving = serving_of(base)
    losses, right = [], []
    for each in EXAMPLES:
        losses.append(nll(base, serving, each.ids, each.answer_start))
        if each.answer in each.options:
            sums = {}
            for option in each.options:
                ids = example("", option).ids
                whole = (*each.prompt_ids, *ids)
                sums[option] = nll(base, serving, whole, each.answer_start).sum()
            right.append(min(sums, key=sums.get) == each.answer)
    metrics = score(base, serving, EXAMPLES, replace(QUICK, generate=False)).metrics
    assert metrics["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert metrics["accuracy"] == sum(right) / 2


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_answers_of_a_padded_batch_are_those_of_each_prompt_alone(name, beams):
    base = base_of(CAUSAL[name]())
    serving = serving_of(base)
    scoring = replace(QUICK, beams=beams)
    prompts = [each.prompt_ids for each in EXAMPLES]
    together = generate(base, serving, prompts, scoring)
    alone = [generate(base, serving, [prompt], scoring)[0] for prompt in prompts]
    assert together == alone
    assert any(together)


def test_greedy_answers_follow_the_likeliest_token():
    base = base_of()
    serving = serving_of(base)
    ids = list(EXAMPLES[0].prompt_ids)
    with base.adapted.bound(serving.plan, serving.tree) as model, torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
    expected = base.tokenizer.decode(
        ids[len(EXAMPLES[0].prompt_ids) :], skip_special_tokens=True
    ).strip()
    assert generate(base, serving, [EXAMPLES[0].prompt_ids], QUICK) == [expected]


def test_two_servings_answer_differently():
    base = base_of()
    prompts = [each.prompt_ids for each in EXAMPLES]
    first = generate(base, serving_of(base, 0), prompts, QUICK)
    assert first != generate(base, serving_of(base, 1), prompts, QUICK)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_scored_by_its_labels(name):
    base = base_of(CLASSIFIERS[name]())
    serving = serving_of(base)
    examples = [
        Example(tuple(range(3, 5 + i)), 2 + i, str(i % 3), ("0", "1", "2"), i % 3) for i in range(7)
    ]
    losses, right = [], []
    for each in examples:
        with base.adapted.bound(serving.plan, serving.tree) as model, torch.no_grad():
            logits = model(input_ids=torch.tensor([each.ids])).logits
        losses.append(functional.cross_entropy(logits, torch.tensor([each.label])).item())
        right.append(logits.argmax().item() == each.label)
    metrics = score(base, serving, examples, QUICK).metrics
    assert metrics == {
        "loss": pytest.approx(sum(losses) / 7, abs=1e-5),
        "accuracy": pytest.approx(sum(right) / 7),
    }


def test_no_examples_give_no_metrics():
    base = base_of()
    assert score(base, serving_of(base), [], QUICK).metrics == {}


def test_text_metrics_of_texts_one_can_check_by_hand():
    metrics = text_metrics(["the cat sat ", "dogs running"], ["the cat sat", "a dog ran"])
    assert metrics["exact_match"] == 0.5
    # Stemmed, "dogs" meets "dog": one of two predicted and one of three expected words.
    assert metrics["rouge1"] == pytest.approx(100 * (1 + 2 * (1 / 2) * (1 / 3) / (5 / 6)) / 2)
    assert text_metrics([], []) == {}
