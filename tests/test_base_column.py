"""The column base: the base model's own scores, without any adapter, in tables and comparisons."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import InThisProcess, call
from report_records import recommit
from runs_for_tests import save_model, scores_of, settings_for, write_clients
from transformers import AutoModelForCausalLM

from fedalt.adapters.plan import HEAD
from fedalt.core.tree import Name
from fedalt.engine.schedule import UNTRAINED
from fedalt.report.compared_page import read_results
from fedalt.report.comparison import grids_of
from fedalt.report.grid import draw_grid
from fedalt.report.table import describe, run_table
from fedalt.runs.folder import open_run
from fedalt.runs.kept_settings import settings_of_run
from fedalt.runs.lifecycle import evaluate, reopen, start_run
from fedalt.runs.setup import base_arm, prepare


def base_lines(lines):
    return {line["client"]: line["metrics"] for line in lines if line.get("column") == "base"}


def plain_loss(model, examples):
    """The mean over answer tokens of the loss of a model as transformers loads it."""
    losses = []
    for one in examples:
        ids = torch.tensor(one.ids)
        logits = model(ids[None]).logits[0, :-1].float()
        all_ = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses.append(all_[one.answer_start - 1 :])
    return float(torch.cat(losses).mean())


def test_its_loss_is_that_of_the_model_as_transformers_loads_it(finished_run, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    task = reopen(finished_run).task
    found = base_lines(open_run(finished_run).lines())
    assert set(found) == {"a", "b", "c"}
    with torch.no_grad():
        for client, metrics in found.items():
            expected = plain_loss(model, task.examples(client, "test"))
            assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
            assert {"rougeL", "exact_match"} <= metrics.keys()


def test_it_is_scored_once_at_the_end_and_belongs_to_no_round(finished_run):
    lines = open_run(finished_run).lines()
    of_base = [line for line in lines if line.get("column") == "base"]
    assert [line["client"] for line in of_base] == ["a", "b", "c"]
    assert {line["round"] for line in of_base} == {UNTRAINED}
    assert {line["split"] for line in of_base} == {"test"}
    assert [line for line in lines if line["kind"] == "score"][-3:] == of_base
    assert describe(lines)[0].endswith("base without any training")
    table = run_table(lines)
    assert table.columns == ("own", "shared", "local", "base")
    assert table.baseline == "local"


def test_evaluating_again_gives_the_same_numbers_on_both_splits(finished_run, capsys):
    recorded = base_lines(open_run(finished_run).lines())
    assert base_lines(evaluate(reopen(finished_run), finished_run, "test")) == recorded
    assert call("evaluate", finished_run, "--split", "validation", "--json", "-q") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["losses"]["columns"] == ["own", "shared", "local", "base"]


def test_it_can_be_left_out(tiny_model_dir, clients_dir, tmp_path):
    settings = settings_for(
        tiny_model_dir, clients_dir, rounds={"rounds": 1}, scoring={"base": False}
    )
    run = start_run(prepare(settings), tmp_path / "run").path
    assert not base_lines(scores_of(run))
    assert "base" not in run_table(open_run(run).lines()).columns


def test_two_processes_record_what_one_does(tiny_model_dir, clients_dir, tmp_path):
    found = []
    for count in (1, 2):
        short = {"rounds": {"rounds": 1}, "scoring": {"generate": False, "batch_size": 4}}
        settings = settings_for(tiny_model_dir, clients_dir, training={"processes": count}, **short)
        run = start_run(prepare(settings), tmp_path / str(count)).path
        found.append(base_lines(scores_of(run)))
    assert found[0].keys() == found[1].keys() == {"a", "b", "c"}
    for client, metrics in found[0].items():
        assert found[1][client] == pytest.approx(metrics, rel=1e-5)


def test_a_classifier_has_one_only_with_the_head_of_its_checkpoint(finished_run):
    parts = reopen(finished_run).parts
    assert base_arm(parts) is not None
    name = Name("score", HEAD, "weight")
    drawn = replace(parts.init, heads={name: (3, 32)})
    assert base_arm(replace(parts, init=drawn)) is None
    kept = replace(drawn, given={name: torch.ones(3, 32)})
    arm = base_arm(replace(parts, init=kept))
    client = arm.method.init_client(kept, "a")
    assert torch.equal(client.head[name], torch.ones(3, 32))
    assert all(not tensor.any() for at, tensor in client.individual.items() if at.factor == "B")


METHODS = """
seeds = [0, 1]
data.path = "data"
data.max_length = 60
model = {name = "model", device = "cpu"}
training.batch_size = 4
rounds.rounds = 1
scoring.max_new_tokens = 4
[[methods]]
name = "fedit"
rank = 1
[[methods]]
name = "local"
rank = 1
"""


def test_a_comparison_scores_it_once_for_all_runs(tmp_path, capsys, monkeypatch):
    here = SimpleNamespace(Popen=InThisProcess)
    monkeypatch.setattr("fedalt.runs.compare.subprocess", here)
    save_model(tmp_path / "model")
    write_clients(tmp_path / "data", clients=("a", "b"))
    file, out = tmp_path / "methods.toml", tmp_path / "out"
    file.write_text(METHODS)
    assert call("compare", file, "--out", out, "--jobs", 1, "--json") == 0
    said = capsys.readouterr()
    assert said.err.count("scoring the base model without any adapter, for 4 runs") == 1
    runs = sorted(run.parent for run in out.glob("*/*/rounds.jsonl"))
    assert len(runs) == 4
    assert not any(base_lines(scores_of(run)) for run in runs)
    (kept,) = out.glob("base-*.json")
    told = json.loads(said.out)["base"]
    assert told == {"base": json.loads(kept.read_text())["scores"]}
    alone = base_lines(evaluate(_with_base(reopen(runs[0])), runs[0], "test"))
    assert told["base"] == alone
    assert "| base |" in (out / "table.md").read_text()
    results = read_results(out)
    assert results.base == told
    assert list(grids_of(results)["losses"].rows) == ["fedit", "local", "base"]
    cells = grids_of(results)["losses"].rows["base"]
    assert cells[0].seeds == (alone["a"]["loss"],)
    assert draw_grid(grids_of(results)["losses"], "losses").rows[-1][0] == "base"

    monkeypatch.setattr("fedalt.runs.base_scores._score", None)  # what is there is not scored again
    of_before = runs[0] / "settings.toml"
    of_before.write_text(of_before.read_text().replace("base = false\n", ""))
    assert call("compare", file, "--out", out, "--quiet") == 0


def _with_base(prepared):
    settings = prepared.parts.settings
    scoring = replace(settings.scoring, base=True)
    return replace(
        prepared, parts=replace(prepared.parts, settings=replace(settings, scoring=scoring))
    )


def test_a_run_of_before_the_column_has_three_and_goes_on_without_a_warning(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    lines = [line for line in open_run(run).lines() if line.get("column") != "base"]
    assert run_table(lines).columns == ("own", "shared", "local")
    facts = json.loads((run / "run.json").read_text())
    del facts["settings"]["scoring"]["base"]
    (run / "run.json").write_text(json.dumps(facts))
    recommit(run)
    assert settings_of_run(open_run(run))[1] == ()
