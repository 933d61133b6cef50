"""Comparisons and tuning: real runs of a tiny model, and tables checked by hand."""

import json
import shutil
import subprocess
import sys
import time
import tomllib

import psutil
import pytest
import torch
from bases import llama
from commands import call
from runs_for_tests import adapters_of, save_model, write_clients

from fedalt.report.compared_figures import ranked
from fedalt.report.comparison import Compared, Results, grid_of, grids_of
from fedalt.report.gaps import SIGNIFICANT, p_value
from fedalt.report.grid import grid_csv, grid_markdown
from fedalt.report.table import joined
from fedalt.runs.compare import read_comparison, run_all
from fedalt.runs.folder import open_run
from fedalt.runs.kept_settings import settings_table
from fedalt.runs.settings import SettingsError, settings_of

BARE = {"data": {"path": "."}, "method": {"name": "fedalt"}}

FILE = """
seeds = [0, 1]
[data]
path = "data"
max_length = 60
validation = 0.2
[model]
name = "model"
device = "cpu"
[training]
lr = 1e-2
batch_size = 4
[rounds]
rounds = 1
[scoring]
max_new_tokens = 4
[[methods]]
name = "fedalt"
rank = 2
[[methods]]
name = "ffa_lora"
label = "FFA-LoRA, faster"
rank = 2
[methods.training]
lr = 3e-2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A comparison that has been run, and its file."""
    place = tmp_path_factory.mktemp("comparison")
    save_model(place / "model")
    write_clients(place / "data", clients=("a", "b"))
    (place / "methods.toml").write_text(FILE)
    assert call("compare", place / "methods.toml", "--out", place / "out", "--quiet") == 0
    return place


def test_every_method_and_seed_is_a_run_with_its_own_settings(place):
    for seed in (0, 1):
        run = place / "out" / "ffa-lora-faster" / f"seed-{seed}"
        settings = tomllib.loads((run / "settings.toml").read_text())
        assert settings["seed"] == seed
        assert settings["local_baseline"] is False
        assert settings["method"]["name"] == "ffa_lora"
        assert settings["training"] == {**settings["training"], "lr": 3e-2, "batch_size": 4}
    assert (place / "out" / "fedalt" / "seed-1" / "run.json").exists()


def test_results_hold_a_line_for_every_method_seed_client_and_metric(place):
    text = (place / "out" / "results.jsonl").read_text()
    view, *lines = map(json.loads, text.splitlines())
    assert view == {"metric": "score", "steps": "equal"}
    base = [line for line in lines if "base" in line]
    lines = [line for line in lines if "base" not in line]
    assert {(line["base"], line["client"]) for line in base} == {("base", "a"), ("base", "b")}
    scores = {(e["method"], e["seed"], e["client"], e["metric"]): e for e in lines if "client" in e}
    assert {key[:3] for key in scores} == {
        (method, seed, client)
        for method in ("fedalt", "FFA-LoRA, faster")
        for seed in (0, 1)
        for client in "ab"
    }
    run = open_run(place / "out" / "fedalt" / "seed-1")
    (own,) = (
        line["metrics"]
        for line in run.lines()
        if line["kind"] == "score" and line["split"] == "test"
        if (line["client"], line["column"]) == ("b", "own")
    )
    assert scores["fedalt", 1, "b", "loss"]["value"] == own["loss"]
    notes = {e["method"]: e["notes"] for e in lines if "notes" in e}
    assert notes == {"fedalt": [], "FFA-LoRA, faster": []}
    costs = {(e["method"], e["seed"]): e for e in lines if not {"client", "notes"} & e.keys()}
    assert costs["fedalt", 0]["upload_bytes"] > costs["FFA-LoRA, faster", 0]["upload_bytes"] > 0


def test_the_table_states_the_budget_and_who_differs(place):
    text = (place / "out" / "table.md").read_text()
    assert "rounds 1, local epochs 1, batch size 4, learning rate 0.01, rank 2" in text
    assert "FFA-LoRA, faster: learning rate 0.03." in text
    assert "| method | a | b | mean | worst client | gap to the best, " in text
    assert "A client takes 3 optimiser steps with every method, serving included." in text


def test_a_comparison_goes_on_where_it_was_and_repeats_nothing(place, capsys):
    out = place / "again"
    shutil.copytree(place / "out", out)
    shutil.rmtree(out / "fedalt" / "seed-1")
    before = adapters_of(out)
    assert call("compare", place / "methods.toml", "--out", out) == 0
    assert "4 runs, 3 finished" in capsys.readouterr().err
    after = adapters_of(out)
    assert {key: after[key] for key in before} == before
    whole = {k: v for k, v in adapters_of(place / "out").items() if k.startswith("fedalt/seed-1")}
    assert whole.items() <= after.items()  # the run once more gives the same bits


def test_a_run_killed_between_its_first_two_files_begins_again(place):
    out = place / "half"
    shutil.copytree(place / "out", out)
    half = out / "fedalt" / "seed-1"
    settings = (half / "settings.toml").read_text()
    shutil.rmtree(half)
    half.mkdir()
    (half / "settings.toml").write_text(settings)
    assert call("compare", place / "methods.toml", "--out", out, "--quiet") == 0
    assert (half / "run.json").exists()


def test_a_comparison_that_is_terminated_ends_the_runs_it_has_started(place):
    long, out = place / "long.toml", place / "terminated"
    long.write_text(FILE.replace("rounds = 1", "rounds = 500"))
    command = [sys.executable, "-m", "fedalt", "compare", long, "--out", out]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not [*out.glob("*/*/run.json")] and time.monotonic() < deadline:
            time.sleep(0.05)
        runs = psutil.Process(process.pid).children()
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert runs
    _, alive = psutil.wait_procs(runs, timeout=60)
    assert not alive
    assert "Traceback" not in said


def test_other_settings_for_runs_that_are_there_are_refused(place, capsys):
    other = place / "other.toml"
    other.write_text(FILE.replace("rounds = 1", "rounds = 2"))
    assert call("compare", other, "--out", place / "out") == 2
    assert "was run with other settings: [rounds] rounds was" in capsys.readouterr().err


def test_finished_runs_and_new_ones_need_the_same_data_and_base_model(place, capsys):
    here = place / "changing"
    for name in ("data", "model", "out"):
        shutil.copytree(place / name, here / name)
    for settings in here.glob("out/*/*/settings.toml"):
        settings.write_text(settings.read_text().replace(str(place), str(here)))
    file, words = here / "methods.toml", ("--out", here / "out", "--quiet")
    file.write_text(FILE.replace("lr = 3e-2", 'lr = 3e-2\n[[methods]]\nname = "fedit"\nrank = 2'))
    test = here / "data" / "a.test.jsonl"
    text = test.read_text()
    test.write_text(text + text.splitlines()[0].replace("?", "??") + "\n")
    assert call("compare", file, *words) == 2
    assert "the run began with other client data" in capsys.readouterr().err
    test.write_text(text)
    other = llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(here / "model")
    assert call("compare", file, *words) == 2
    assert "were trained on different base models" in capsys.readouterr().err


def test_a_run_whose_rate_was_changed_halfway_is_not_one_of_the_new_rate(place, capsys):
    out = place / "halfway"
    shutil.copytree(place / "out", out)
    for settings in out.glob("fedalt/*/settings.toml"):
        settings.write_text(settings.read_text().replace("lr = 0.01", "lr = 0.02"))
    file = place / "halfway.toml"
    file.write_text(FILE.replace("lr = 1e-2", "lr = 2e-2"))
    assert call("compare", file, "--out", out) == 2
    told = "was changed while it ran: [training] lr was 0.01 when it began, and is 0.02 now"
    assert told in capsys.readouterr().err


def test_a_setting_that_was_not_there_when_a_run_began_had_its_default(place):
    out = place / "older"
    shutil.copytree(place / "out", out)
    file = out / "fedalt" / "seed-0" / "settings.toml"
    older = [line for line in file.read_text().splitlines() if not line.startswith("patience")]
    older = [line for line in older if not line.startswith("evaluate_every")]
    file.write_text("\n".join(older))
    assert call("compare", place / "methods.toml", "--out", out, "--quiet") == 0


def test_what_has_no_test_is_not_compared(place, capsys):
    file, out = place / "untested.toml", place / "untested"
    file.write_text(FILE.replace("rounds = 1", "rounds = 1\ntest = false"))
    assert call("compare", file, "--out", out) == 2
    told = "untested.toml: fedalt: [rounds] test = false leaves nothing to compare"
    assert told in capsys.readouterr().err
    shutil.copytree(place / "data", place / "trained", ignore=shutil.ignore_patterns("*.test.*"))
    file.write_text(FILE.replace('path = "data"', 'path = "trained"'))
    assert call("compare", file, "--out", out) == 2
    assert "trained: no client has test data" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('path = "data"', 'path = "nodata"', "nodata: no such file or folder"),
        ("lr = 3e-2", "lr = 3e-2\n[[methods]]\nname = 'florist'\nranks = {zoe = 2}", "names 'zoe'"),
    ],
)
def test_mistakes_in_data_are_told_once_and_before_any_run(place, capsys, old, new, complaint):
    file, out = place / "undone.toml", place / "undone"
    file.write_text(FILE.replace(old, new))
    assert call("compare", file, "--out", out) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert complaint in said
    assert not out.exists()


def test_a_run_that_fails_is_named_and_the_others_end(place, capsys):
    file = place / "failing.toml"
    file.write_text(FILE.replace("seeds = [0, 1]", "seeds = [0]").replace("3e-2", "1e30"))
    assert call("compare", file, "--out", place / "failing") == 1
    said = capsys.readouterr()
    assert "FFA-LoRA, faster, seed 0: error: client 'a', round 1: the loss became" in said.err
    assert "fedalt" in said.out


def test_a_run_that_fails_before_it_has_a_folder_leaves_the_others_their_table(place, capsys):
    file = place / "early.toml"
    text = FILE.replace("seeds = [0, 1]", "seeds = [0]").replace("lr = 3e-2", "")
    file.write_text(text.replace("[methods.training]", "[methods.model]\nname = 'nowhere'"))
    assert call("compare", file, "--out", place / "early") == 1
    said = capsys.readouterr()
    assert "FFA-LoRA, faster, seed 0: error:" in said.err
    assert "is not a run" not in said.err
    assert "fedalt" in said.out


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('name = "ffa_lora"', 'name = "fa_lora"', r"\[\[methods\]\] 2.*no method 'fa_lora'"),
        ('label = "FFA-LoRA, faster"', 'label = "fedalt"', "two methods are called 'fedalt'"),
        (
            'label = "FFA-LoRA, faster"',
            f'label = "{"x" * 81}"',
            "label: expected at most 80 letters",
        ),
        ('label = "FFA-LoRA, faster"', "rnak = 3", r"\[\[methods\]\] 2.*unknown key 'rnak'"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds: expected a list of different whole numbers"),
        ("[[methods]]", "[[others]]", "expected at least one"),
        ("[rounds]", "[method]", "'method' belongs to a single run"),
        ('name = "ffa_lora"\nlabel = "FFA-LoRA, faster"', 'name = "FFA*"', "no method 'FFA.'"),
        ("lr = 3e-2", "lr = 3e-2\n[methods.tune]\ntrials = 8", r"\[tune\] trials: method 'ffa_l"),
    ],
)
def test_mistakes_are_found_before_anything_runs(place, old, new, complaint):
    file = place / "wrong.toml"
    file.write_text(FILE.replace(old, new))
    with pytest.raises(SettingsError, match=complaint):
        read_comparison(file)


def test_a_table_says_what_everybody_trained_and_how_long(place):
    text = (place / "out" / "table.md").read_text()
    assert "| trainable | rank | steps |" in text
    # 8 sites: q and v of two layers have A (2, 32) and B (32, 2) or (16, 2); mixers are (2, 32).
    lines = map(json.loads, (place / "out" / "results.jsonl").read_text().splitlines())
    costs = [line for line in lines if "steps" in line and "method" in line]
    fedalt = next(cost for cost in costs if cost["method"] == "fedalt")
    assert fedalt["trained"] == {"individual": 2 * (2 * (32 + 32) + 2 * (32 + 16)), "mixer": 256}
    assert fedalt["trainable_numbers"] == sum(fedalt["trained"].values())
    assert fedalt["steps"] == 3  # 12 records, of which 3 validate: batches of 4
    assert "fedalt individual" in text


def scored(*rows: dict[str, float]):
    return [{name: {"accuracy": value} for name, value in row.items()} for row in rows]


def test_the_base_model_is_shown_on_the_clients_that_methods_have():
    entry = Compared("x", settings_table(settings_of(BARE, "x")), ())
    base = {"base": {"a": {"loss": 4.0}, "b": {"loss": 6.0}, "gone": {"loss": 90.0}}}
    scores = {"x": [{"a": {"loss": 1.0}, "b": {"loss": 2.0}}]}
    results = Results([entry], [0], scores, {"x": []}, base=base)
    row = grids_of(results)["losses"].rows["base"]
    assert [cell.seeds for cell in row] == [(4.0,), (6.0,), (5.0,), (6.0,)]


def test_the_best_is_bold_only_where_a_paired_test_supports_it():
    clients = "abcdef"
    close = joined(
        {
            "x": scored({c: 0.5 + 0.1 * (i % 2) for i, c in enumerate(clients)}),
            "y": scored({c: 0.5 + 0.1 * ((i + 1) % 2) for i, c in enumerate(clients)}),
        }
    )
    assert "**" not in grid_markdown(grid_of(close), {}, ())
    clear = joined(
        {
            "x": scored({c: 0.5 + 0.01 * i for i, c in enumerate(clients)}),
            "y": scored({c: 0.6 + 0.02 * i for i, c in enumerate(clients)}),
        }
    )
    grid = grid_of(clear)
    assert [cell.bold for cell in grid.rows["y"]] == [False] * 6 + [True, False]
    assert "**65.0**" in grid_markdown(grid, {}, ())
    assert "y,mean,65.0" in grid_csv(grid)


def test_six_pairs_all_in_one_direction_are_the_fewest_that_tell():
    assert p_value((1.0, 2.1, 3.2, 4.3, 5.4, 6.5)) < SIGNIFICANT
    assert p_value((1.0, 2.1, 3.2, 4.3, 5.4)) >= SIGNIFICANT
    assert p_value((0.0,) * 6) >= SIGNIFICANT


def test_many_clients_are_shown_by_task():
    names = [f"{task}-{number}" for task in ("one", "two") for number in range(8)]
    table = joined({"x": scored({name: 0.25 * (name < "two") for name in names})})
    grid = grid_of(table)
    assert grid.columns == ("one", "two", "mean", "worst client")
    assert [cell.seeds for cell in grid.rows["x"]] == [(25.0,), (0.0,), (12.5,), (0.0,)]


def test_a_task_whose_name_begins_as_anothers_keeps_all_of_its_clients():
    names = [f"qa-{number}" for number in range(1, 10)] + [f"qa-2-{n}" for n in range(4)]
    grid = grid_of(joined({"x": scored({name: 0.1 * (name < "qa-2") for name in names})}))
    assert grid.columns == ("qa", "qa-2", "mean", "worst client")
    assert grid.rows["x"][0].seeds == pytest.approx((10 / 9,))


def test_clients_may_be_called_as_a_column_of_the_whole():
    better = {"a": 0.9, "mean": 0.9, "worst client": 0.5, "z": 0.1}
    table = joined({"x": scored(better), "y": scored(dict.fromkeys(better, 0.2))})
    grid = grid_of(table)
    assert grid.columns[1:3] == ("client mean", "client worst client")
    assert grid.columns[-2:] == ("mean", "worst client")
    assert [cell.seeds for cell in grid.rows["x"]][-2:] == [(pytest.approx(60.0),), (10.0,)]
    assert list(ranked(table)) == ["x", "y"]


def test_methods_with_other_clients_have_cells_but_no_test():
    clients = [f"{task}-{number}" for task in ("one", "two") for number in range(8)]
    table = joined(
        {
            "few": scored(dict.fromkeys(("one", "two"), 0.5)),
            "many": scored(dict.fromkeys(clients, 0.75)),
        }
    )
    grid = grid_of(table)
    assert grid.columns == ("one", "two", "mean", "worst client")
    assert [cell.seeds for cell in grid.rows["few"]] == [(50.0,)] * 4
    assert [cell.seeds for cell in grid.rows["many"]] == [(75.0,)] * 4
    assert not any(cell.bold for cell in grid.rows["many"])


@pytest.mark.parametrize(
    ("workers", "jobs", "expected"), [(2, 5, [4, 4, 4, 4, 8]), (4, 2, [4, 4]), (2, 2, [4, 4])]
)
def test_the_last_runs_share_all_cores(monkeypatch, workers, jobs, expected):
    monkeypatch.setattr("fedalt.runs.compare.cores", lambda: 8)
    given = {}
    monkeypatch.setattr(
        "fedalt.runs.compare._run", lambda job, cores, _: given.__setitem__(job, cores)
    )
    assert len(list(run_all(range(jobs), workers))) == jobs
    assert [given[job] for job in range(jobs)] == expected
