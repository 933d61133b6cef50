"""Scores: answer loss, accuracy over options, generated text, against the plainest computation."""

import math
from dataclasses import replace

import pytest
import torch
from bases import base_of, example, random_serving_tree
from tiny import CAUSAL, CLASSIFIERS
from torch.nn import functional

from fedalt.adapters.packing import Packs
from fedalt.adapters.plan import Mixer, Plan, Router, Similarity, Slot, Sum, single
from fedalt.data.examples import Example
from fedalt.evaluation import Scoring, embed, generate, in_groups, score, score_together
from fedalt.methods.contract import Serving
from fedalt.metrics import text_metrics
from fedalt.training.group import TrainingError

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


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", CAUSAL)
def test_answers_are_those_that_transformers_alone_writes(name, beams):
    base = base_of(CAUSAL[name]())
    serving = serving_of(base)
    prompts = [each.prompt_ids for each in EXAMPLES]
    answers = generate(base, serving, prompts, Scoring(max_new_tokens=20, beams=beams))
    for prompt, answer in zip(prompts, answers, strict=True):
        with base.adapted.bound(serving.plan, serving.tree) as model:
            written = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=20,
                num_beams=beams,
                do_sample=False,
                use_cache=True,
                pad_token_id=base.pad_id,
                eos_token_id=base.tokenizer.eos_token_id,
            )[0, len(prompt) :]
        assert answer == base.tokenizer.decode(written, skip_special_tokens=True).strip()


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


def test_options_are_weighed_by_sums_or_by_means_of_their_tokens():
    base = base_of()
    serving = serving_of(base)
    sizes = {"b": 2, "aaaaaaaa": 9}  # with the end; a long option loses by its sum alone
    asked = example("which", "aaaaaaaa", tuple(sizes))
    behind = {option: example("", option).ids for option in sizes}
    sums = {
        option: nll(base, serving, (*asked.prompt_ids, *ids), asked.answer_start).sum().item()
        for option, ids in behind.items()
    }
    means = {option: total / len(behind[option]) for option, total in sums.items()}
    for way, of_options in (("sum", sums), ("mean", means)):
        found = score(base, serving, [asked], replace(QUICK, generate=False, options=way))
        right = min(of_options, key=of_options.get) == "aaaaaaaa"
        assert found.metrics["accuracy"] == right, way
    assert min(sums, key=sums.get) != min(means, key=means.get)


def test_an_option_that_the_tokenizer_cannot_tell_from_the_right_one_is_no_right_answer():
    base = base_of()
    asked = example("which", "a", ("a", "b"))
    same = replace(asked, options=("a", "A"), option_ids=(asked.ids[asked.answer_start :],) * 2)
    found = score(base, serving_of(base), [same], replace(QUICK, generate=False))
    assert found.metrics["accuracy"] == 0


def test_a_model_without_finite_losses_is_right_about_nothing():
    base = base_of()
    serving = serving_of(base)
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in serving.tree.items()}
    whole = score_together(
        base, [(serving, EXAMPLES), (replace(serving, tree=broken), EXAMPLES)], QUICK
    )
    assert "accuracy" in whole[0].metrics
    assert math.isnan(whole[1].metrics["loss"])
    assert "accuracy" not in whole[1].metrics


@pytest.mark.parametrize("what", ["losses", "answers", "beams", "labels", "prompts"])
def test_memory_that_runs_out_while_scoring_is_told_with_what_to_lower(what):
    base = base_of(CLASSIFIERS["bert_classifier"]() if what == "labels" else None)
    served = serving_of(base)
    text = Example((5, 6, 7), 3, "0", tuple("012"), 0)
    score_it = {
        "losses": lambda: score(base, served, EXAMPLES, replace(QUICK, generate=False)),
        "answers": lambda: generate(base, served, [(5, 6)], QUICK),
        "beams": lambda: generate(base, served, [(5, 6)], replace(QUICK, beams=2)),
        "labels": lambda: score(base, served, [text], QUICK),
        "prompts": lambda: embed(base, PLAN, served.tree, [(5, 6)], 3),
    }[what]
    score_it()

    def fill_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    base.adapted.model.get_submodule(next(iter(base.adapted.sites))).register_forward_hook(
        fill_memory
    )
    with pytest.raises(TrainingError, match="tokens at once; lower --eval-batch-size or"):
        score_it()


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


SLOTS = (Slot("individual", 2, 4), Slot("rest_of_world", 3, 6))
PLANS = {
    "sum": Plan(SLOTS, Sum((1.0, 0.5))),
    "mixer": Plan(SLOTS, Mixer()),
    "router": Plan(SLOTS, Router(own=0, layout="paper", renormalise=False)),
    "similarity": Plan(SLOTS, Similarity(0.5, 0, 1)),
}
# Clients with different numbers of examples, of tokens and of options.
DATA = [
    EXAMPLES,
    [example("a longer question than these", "yes", ("no", "yes", "perhaps"))],
    [],
    [example(f"question {n}", "abc"[n % 3], tuple("abc")) for n in range(6)],
    EXAMPLES[:2],
]


def asked_of(base, plan, data):
    stream = torch.Generator().manual_seed(5)
    references = [torch.randn(3, 32, generator=stream) for _ in data]
    return [
        (Serving(plan, random_serving_tree(base, plan, seed), references[seed]), examples)
        for seed, examples in enumerate(data)
    ]


def assert_same(together, alone):
    assert [each.predictions for each in together] == [each.predictions for each in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
        assert one.losses == pytest.approx(other.losses, rel=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_clients_scored_together_have_the_scores_of_each_alone(name, plan, beams):
    base = base_of(CAUSAL[name](), "all-linear")
    asked = asked_of(base, plan, DATA)
    scoring = Scoring(batch_size=5, max_new_tokens=6, beams=beams)
    together = score_together(base, asked, scoring)
    assert_same(together, [score(base, *each, scoring) for each in asked])
    assert together == score_together(base, asked, scoring)
    assert len({text for each in together for text in each.predictions}) > 5


@pytest.mark.parametrize("plan", [PLANS["mixer"], PLANS["similarity"]], ids=["mixer", "similarity"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_scored_together_have_the_scores_of_each_alone(name, plan):
    base = base_of(CLASSIFIERS[name]())
    labels = ("zero", "one", "two")
    data = [
        [
            Example(tuple(range(3 + k, 5 + k + i)), 2 + i, labels[i % 3], labels, i % 3)
            for i in range(count)
        ]
        for k, count in enumerate((4, 1, 7))
    ]
    asked = asked_of(base, plan, data)
    together = score_together(base, asked, QUICK)
    assert_same(together, [score(base, *each, QUICK) for each in asked])
    assert {text for each in together for text in each.predictions} <= set(labels)


def test_servings_of_other_plans_or_shapes_are_scored_in_one_call_too():
    base = base_of()
    plans = [PLANS["sum"], PLANS["mixer"], single(Slot("individual", 5, 4)), PLANS["sum"], PLAN]
    asked = [asked_of(base, plan, DATA)[at] for at, plan in enumerate(plans)]
    together = score_together(base, asked, QUICK)
    assert_same(together, [score(base, *each, QUICK) for each in asked])


def test_a_text_too_long_to_be_packed_is_padded_and_so_are_its_options():
    base = base_of()
    asked = asked_of(base, PLANS["mixer"], DATA)
    packed = score_together(base, asked, QUICK)
    base.adapted.packs = Packs(12)
    assert_same(score_together(base, asked, QUICK), packed)


def test_no_pass_holds_more_examples_than_one_client_could_bring():
    base = base_of()
    rows = []
    base.adapted.model.model.embed_tokens.register_forward_hook(
        lambda _, given, __: rows.append(given[0].shape)
    )
    asked = asked_of(base, PLANS["mixer"], [EXAMPLES[:1]] * 20)
    prompts = len(EXAMPLES[0].prompt_ids)
    score_together(base, asked, Scoring(batch_size=8, max_new_tokens=2))
    assert max(shape[0] for shape in rows) == 8
    assert [shape[0] for shape in rows if shape[1] == prompts and shape[0] > 1] == [8, 8, 4]
    most = len(EXAMPLES[0].ids) + sum(len(option) + 1 for option in EXAMPLES[0].options)
    assert max(shape[1] for shape in rows if shape[0] == 1) <= 8 * most


def test_groups_of_clients_stay_small_however_many_there_are():
    few, many, none = EXAMPLES[:1], EXAMPLES * 5, []
    clients = [(str(n), few) for n in range(50)]
    assert [len(group) for group in in_groups(clients, Scoring())] == [16, 16, 16, 2]
    sizes = [len(g) for g in in_groups([("a", many), ("b", none), ("c", few), ("d", many)], QUICK)]
    assert sizes == [1, 2]


def half_of_which_end(base, serving, prompts, scoring):
    """Prompts of which most answers soon have a sign that is no other's, which then ends texts."""
    texts = generate(base, serving, prompts, scoring)

    def parts(sign):
        soon = [prompt for prompt, text in zip(prompts, texts, strict=True) if sign in text[:9]]
        never = [prompt for prompt, text in zip(prompts, texts, strict=True) if sign not in text]
        return soon, never[: max(len(soon) - 1, 0)]

    signs = sorted(set("".join(texts)) - {" "})
    base.tokenizer.eos_token = max(signs, key=lambda sign: min(map(len, parts(sign))))
    return parts(base.tokenizer.eos_token)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_an_answer_that_does_not_end_does_not_hold_up_the_others(name, cached):
    base = base_of(CAUSAL[name]())
    base.adapted.model.generation_config.use_cache = cached
    serving, scoring = serving_of(base), Scoring(max_new_tokens=20)
    prompts = [example(f"{n} {chr(97 + n)}", "").prompt_ids for n in range(16)]
    soon, never = half_of_which_end(base, serving, prompts, scoring)
    rows = []
    base.adapted.model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: rows.append(len(given[0]))
    )
    together = generate(base, serving, [*soon, *never], scoring)
    assert rows[0] == len(soon) + len(never) >= 5
    assert rows[-1] <= rows[10] <= rows[0] / 2
    assert len(rows) == 20
    alone = [generate(base, serving, [prompt], scoring)[0] for prompt in [*soon, *never]]
    assert together == alone


def test_text_metrics_of_texts_one_can_check_by_hand():
    metrics = text_metrics(["the cat sat ", "dogs running"], ["the cat sat", "a dog ran"])
    assert metrics["exact_match"] == 0.5
    # Stemmed, "dogs" meets "dog": one of two predicted and one of three expected words.
    assert metrics["rouge1"] == pytest.approx(100 * (1 + 2 * (1 / 2) * (1 / 3) / (5 / 6)) / 2)
    assert text_metrics([], []) == {}
