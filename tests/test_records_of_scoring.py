"""What scoring leaves beside metrics: mixers' weights, and a few examples in full."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from bases import base_of, example, random_serving_tree
from commands import call
from report_records import recommit
from runs_for_tests import save_model, settings_for, write_clients
from test_evaluation import DATA, PLANS, asked_of, serving_of
from tiny import CAUSAL, CLASSIFIERS, VOCAB
from transformers import AlbertConfig, AlbertForSequenceClassification

from fedalt.core.tree import Name
from fedalt.data.examples import Example
from fedalt.engine.client_work import WATCHED
from fedalt.engine.example_log import example_log, pieces
from fedalt.evaluation import Scores, Scoring, score, score_together
from fedalt.evaluation.gate_statistics import BINS, weights_by_site, weights_of
from fedalt.methods.contract import Serving
from fedalt.models.base import load_tokenizer
from fedalt.runs.folder import RunFolder
from fedalt.runs.lifecycle import reopen, resume_run, serving, start_run
from fedalt.runs.setup import prepare

QUICK = Scoring(batch_size=3, generate=False)


def mixer_lines(run: Path) -> list[dict]:
    return [line for line in RunFolder(run).lines() if line["kind"] == "mixer"]


def examples_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]


def test_the_weights_of_a_text_are_the_softmax_of_each_sites_input():
    base = base_of()
    served = Serving(PLANS["mixer"], random_serving_tree(base, PLANS["mixer"]))
    inputs = {}
    for site in base.adapted.sites:
        base.adapted.model.get_submodule(site).register_forward_pre_hook(
            lambda _, given, site=site: inputs.update({site: given[0][0]})
        )
    ids = DATA[0][0].ids
    by_site = weights_by_site(base, served, ids)
    for site, weights in by_site.items():
        logits = inputs[site] @ served.tree[Name(site, "mixer", "G")].T
        torch.testing.assert_close(weights, logits.softmax(-1))
    assert by_site.keys() == base.adapted.sites.keys()
    torch.testing.assert_close(weights_of(base, served, ids), sum(by_site.values()) / len(by_site))
    with pytest.raises(ValueError, match="no mixer or router"):
        weights_of(base, serving_of(base), ids)


@pytest.mark.parametrize("plan", [PLANS["mixer"], PLANS["router"]], ids=["mixer", "router"])
@pytest.mark.parametrize("name", ["llama", "bloom", "bert_classifier"])
def test_what_is_counted_while_scoring_is_what_each_text_alone_has(name, plan):
    classifies = name in CLASSIFIERS
    base = base_of({**CAUSAL, **CLASSIFIERS}[name]())
    data = [[Example(tuple(range(3, 9 + n)), 6 + n, "0", tuple("012"), 0) for n in range(4)]] * 2
    asked = asked_of(base, plan, data if classifies else DATA)
    plain = score_together(base, asked, QUICK)
    for first in (2, 50):
        watched = score_together(base, asked, QUICK, watch=first)
        assert [each.metrics for each in watched] == [each.metrics for each in plain]
        for (served, examples), found in zip(asked, watched, strict=True):
            if not examples:
                assert found.weighing is None
                continue
            # What predicts nothing, the last token, is in no causal pass.
            texts = [each.ids if classifies else each.ids[:-1] for each in examples[:first]]
            each = [weights_by_site(base, served, ids) for ids in texts]
            bins = Counter()
            for site, means in found.weighing.weights.items():
                weights = torch.cat([one[site] for one in each])
                assert means == pytest.approx(weights.mean(0).tolist(), rel=1e-4)
                bins.update((weights[:, 0] * BINS).long().clamp(max=BINS - 1).tolist())
            assert sum(found.weighing.histogram) == sum(bins.values())
            moved = sum(abs(n - bins[b]) for b, n in enumerate(found.weighing.histogram))
            assert moved <= 2  # a weight on the edge of a bin


def test_a_layer_that_blocks_share_counts_in_each_of_them():
    sizes = {"embedding_size": 8, "hidden_size": 12, "intermediate_size": 16, "num_labels": 3}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 2}
    config = AlbertConfig(vocab_size=VOCAB, **layers, **sizes)
    base = base_of(AlbertForSequenceClassification(config), "query")
    served = Serving(PLANS["mixer"], random_serving_tree(base, PLANS["mixer"]))
    (site,), inputs = base.adapted.sites, []
    base.adapted.model.get_submodule(site).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0][0])
    )
    one = Example(tuple(range(3, 9)), 6, "0", tuple("012"), 0)
    by_site = weights_by_site(base, served, one.ids)
    each = [(x @ served.tree[Name(site, "mixer", "G")].T).softmax(-1) for x in inputs]
    assert len(each) == 3
    torch.testing.assert_close(by_site[site], sum(each) / 3)
    (found,) = score_together(base, [(served, [one])], QUICK, watch=1)
    assert found.weighing.weights[site] == pytest.approx(by_site[site].mean(0).tolist(), rel=1e-4)
    assert sum(found.weighing.histogram) == 3 * len(one.ids)


def test_every_token_of_a_watched_answer_counts_at_every_site():
    base = base_of(targets="all-linear")
    plan = PLANS["mixer"]
    (served, _), *_ = asked_of(base, plan, DATA)
    one = example("a question", "xyz", ("xyz", "w", "vu"))
    found = score_together(base, [(served, [one])], QUICK, watch=1)[0].weighing
    for site, weights in weights_by_site(base, served, one.ids[:-1]).items():
        assert found.weights[site] == pytest.approx(weights.mean(0).tolist(), rel=1e-4)


def test_a_site_that_sees_one_row_of_each_text_has_no_weights_of_tokens():
    texts = [Example(tuple(range(3, 9 + n)), 6 + n, "0", tuple("012"), 0) for n in range(4)]
    for targets, seen in (("all-linear", 12), ("pooler.dense", 0)):
        base = base_of(CLASSIFIERS["bert_classifier"](), targets)
        served = Serving(PLANS["mixer"], random_serving_tree(base, PLANS["mixer"]))
        (found,) = score_together(base, [(served, texts)], QUICK, watch=3)
        told = list(example_log(base, served, texts, found))
        by_site = weights_by_site(base, served, texts[0].ids)
        assert "bert.pooler.dense" in base.adapted.sites.keys() - by_site.keys()
        assert len(by_site) == seen
        assert all(("tokens" in line) == bool(seen) for line in told)
        if seen:
            assert found.weighing.weights.keys() == by_site.keys()
            assert weights_of(base, served, texts[0].ids).shape == (6, 2)
        else:
            assert found.weighing is None
            assert weights_of(base, served, texts[0].ids) is None


def test_a_run_records_how_its_own_mixers_weigh_whenever_they_are_scored(finished_run):
    lines = mixer_lines(finished_run)
    scored = [
        line
        for line in RunFolder(finished_run).lines()
        if line["kind"] == "score" and line["column"] == "own"
    ]
    about = ("split", "round", "client", "column")
    assert [[line[key] for key in about] for line in lines] == [
        [line[key] for key in about] for line in scored
    ]
    prepared = reopen(finished_run)
    for line in [line for line in lines if line["split"] == "test"]:
        served = serving(prepared.parts, finished_run, line["client"], "own")
        examples = prepared.task.examples(line["client"], "test")[:WATCHED]
        each = [weights_by_site(prepared.parts.base, served, one.ids[:-1]) for one in examples]
        assert line["slots"] == ["individual", "rest_of_world"]
        assert line["weights"].keys() == each[0].keys()
        for site, means in line["weights"].items():
            expected = torch.cat([one[site] for one in each]).mean(0).tolist()
            assert means == pytest.approx(expected, rel=1e-3)
        assert len(line["histogram"]) == BINS
        assert sum(line["histogram"]) == sum(len(one) for found in each for one in found.values())


def test_a_run_keeps_its_best_and_worst_test_examples(finished_run):
    prepared = reopen(finished_run)
    lines = examples_of(finished_run)
    (tested,) = {
        line["round"]
        for line in RunFolder(finished_run).lines()
        if line["kind"] == "score" and line["split"] == "test" and line["column"] == "own"
    }
    assert Counter(line["client"] for line in lines) == {"a": 6, "b": 6, "c": 6}
    tokenizer = prepared.parts.base.tokenizer
    for client in "abc":
        examples = prepared.task.examples(client, "test")
        served = serving(prepared.parts, finished_run, client, "own")
        losses = [
            score(prepared.parts.base, served, [one], QUICK).metrics["loss"] for one in examples
        ]
        told = [line for line in lines if line["client"] == client]
        order = sorted(losses, reverse=True)
        expected = [*order[:3], *order[:-4:-1]]
        assert [line["loss"] for line in told] == pytest.approx(expected, rel=1e-3)
        for line in told:
            assert (line["column"], line["round"]) == ("own", tested)
            assert isinstance(line["prediction"], str)
            assert line["slots"] == ["individual", "rest_of_world"]
            one, *_ = [  # the tokenizer knows no 7: some prompts are the same
                each
                for each in examples
                if tokenizer.decode(each.prompt_ids, skip_special_tokens=True) == line["prompt"]
            ]
            whole = "".join(text for text, _ in line["tokens"])
            assert whole == tokenizer.decode(one.ids, skip_special_tokens=True)
            assert whole == line["prompt"] + line["reference"]
            weights = weights_of(prepared.parts.base, served, one.ids)[:, 0].tolist()
            assert [weight for _, weight in line["tokens"]] == pytest.approx(weights, rel=1e-3)


def test_scoring_again_writes_nothing_and_testing_again_replaces(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "examples.jsonl").unlink()
    recommit(run, tested=False)
    (run / "examples.jsonl").write_text("of a test that was never committed\n")
    assert call("evaluate", run, "--quiet") == 0
    assert (run / "examples.jsonl").read_text() == "of a test that was never committed\n"
    resume_run(reopen(run), run)
    assert examples_of(run) == examples_of(finished_run)


def test_without_a_mixer_there_are_examples_but_no_weights(tmp_path):
    model, data = save_model(tmp_path / "m"), write_clients(tmp_path / "d", ("a", "b"), 4)
    sections = {
        "method": {"name": "fedit"},
        "rounds": {"rounds": 1},
        "scoring": {"generate": False},
    }
    settings = settings_for(model, data, **sections)
    run = start_run(prepare(settings), tmp_path / "run").path
    assert mixer_lines(run) == []
    lines = examples_of(run)
    assert Counter(line["client"] for line in lines) == {"a": 4, "b": 4}
    for line in lines:
        assert line["prediction"] is None
        assert not {"tokens", "slots"} & line.keys()


def test_a_classifiers_predictions_are_names_of_labels():
    base = base_of(CLASSIFIERS["bert_classifier"]())
    labels = ("bad", "fair", "good")
    examples = [Example(tuple(range(3, 6 + n)), 3 + n, "good", labels, 2) for n in range(5)]
    served = serving_of(base)
    found = score(base, served, examples, QUICK)
    lines = list(example_log(base, served, examples, found))
    assert len(lines) == 5
    assert {line["prediction"] for line in lines} <= set(labels)
    assert {line["reference"] for line in lines} == {"good"}


def test_pieces_join_to_the_text_whatever_its_signs():
    tokenizer = load_tokenizer("tiny")
    for text in ("Grüße, Łódź", " two  spaces\n\nand lines ", "日本語 👩‍👩‍👧 ok", "é" * 9):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids)
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_long_prompt_loses_its_middle_in_text_and_tokens():
    base = base_of()
    base.adapted.model.config.max_position_embeddings = 4096
    served = Serving(PLANS["mixer"], random_serving_tree(base, PLANS["mixer"]))
    one = example("a" * 1500 + "b" * 1500, "xyz")
    (line,) = example_log(base, served, [one], Scores({}, ("p",), (0.123456,)))
    assert line["loss"] == 0.1235
    assert line["prompt"] == "a" * 997 + " ... " + "b" * 997
    assert "".join(text for text, _ in line["tokens"]) == line["prompt"] + "xyz"
    assert all(0 < weight < 1 for _, weight in line["tokens"])
