"""The command line as a user meets it: runs, results, and what one client gets of them."""

import io
import json
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
from commands import call
from rich.console import Console
from rich.progress import Progress
from runs_for_tests import adapters_of, settings_for, write_clients

import fedalt
from fedalt.cli.progress import Bars, RoundLines, _trainings
from fedalt.data import suite
from fedalt.engine.schedule import Event
from fedalt.methods import METHODS
from fedalt.runs.setup import prepare


def test_help_and_version_do_without_the_heavy_libraries():
    check = (
        "import sys; sys.argv = ['fedalt', '--help']\n"
        "from fedalt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("demo", "run", "resume", "evaluate", "generate", "export", "data", "methods"):
        assert f" {command} " in done.stdout


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"fedalt {fedalt.__version__}\n"


def test_a_run_by_flags_ends_in_a_folder_and_a_table(run_flags, tmp_path, capsys):
    run = tmp_path / "runs" / "mine"
    assert call("run", *run_flags, "--rounds", 2, "--out", run) == 0
    said = capsys.readouterr()
    assert re.search(r"a +ROUGE-L", said.out)
    assert "gain over local" in said.out
    assert "worst client" in said.out
    assert "round 2/2: loss own" in said.err
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    about = [line for line in lines if "metrics" in line]
    assert {line["column"] for line in about} == {"own", "shared", "local", "base"}
    assert all({"round", "client"} <= line.keys() for line in about)
    for client in "abc":
        assert list((run / "clients" / client).glob("*.safetensors"))


def test_with_json_stdout_holds_one_object_and_nothing_else(run_flags, tmp_path, capsys):
    assert call("run", *run_flags, "--rounds", 1, "--out", tmp_path / "r", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == str(tmp_path / "r")
    assert set(result["scores"]["clients"]) == {"a", "b", "c"}
    assert list(result["losses"]["mean"]["scores"]) == ["own", "shared", "local", "base"]


def test_quiet_leaves_stderr_empty(run_flags, tmp_path, capsys):
    assert call("run", *run_flags, "--rounds", 1, "--out", tmp_path / "r", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_flags_win_over_the_file_and_the_folder_keeps_both(
    run_flags, tmp_path, tiny_model_dir, clients_dir
):
    config = tmp_path / "c.toml"
    config.write_text(
        f"[data]\npath = '{clients_dir}'\n[model]\nname = '{tiny_model_dir}'\n"
        "[method]\nname = 'fedit'\nweighting = 'examples'\n[rounds]\nrounds = 9\n"
    )
    run = tmp_path / "r"
    every = {
        "--method": "fedit",
        "--local-epochs": 2,
        "--lr": 0.5,
        "--seed": 3,
        "--rounds": 1,
        "--alpha": 2,
        "--dropout": 0,
        "--participation": 0.5,
        "--evaluate-every": 1,
        "--validation": 0.2,
        "--weight-decay": 0,
        "--targets": "q_proj,v_proj",
        "--beams": 2,
        "--eval-batch-size": 5,
        "--select": "last",
    }
    words = [word for pair in every.items() for word in pair]
    assert (
        call(
            "run",
            config,
            *run_flags,
            *words,
            "--gradient-checkpointing",
            "--no-yardstick",
            "--out",
            run,
        )
        == 0
    )
    text = (run / "settings.toml").read_text()
    for said in (
        'name = "fedit"',
        'weighting = "examples"',
        "local_epochs = 2",
        "lr = 0.5",
        "seed = 3",
        "rounds = 1",
        "alpha = 2.0",
        "participation = 0.5",
        "beams = 2",
        'select = "last"',
        "gradient_checkpointing = true",
        "local_baseline = false",
        '    "q_proj",\n    "v_proj",',
    ):
        assert said in text
    assert not (run / "local").exists()


def test_without_out_every_run_gets_a_folder_of_its_own(run_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert call("run", *run_flags, "--rounds", 1, "--no-yardstick", "--quiet") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["fedalt", "fedalt-2"]


def test_a_finished_run_says_so_and_shows_its_table(finished_run, capsys):
    before = adapters_of(finished_run)
    assert call("resume", finished_run) == 0
    said = capsys.readouterr()
    assert "is finished" in said.err
    assert "gain over local" in said.out
    assert adapters_of(finished_run) == before


def test_evaluate_finds_the_run_s_own_scores_and_writes_nothing(finished_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    del before[finished_run / ".lock"]
    assert call("resume", finished_run, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert call("evaluate", finished_run, "--json") == 0
    assert json.loads(capsys.readouterr().out) == told
    assert call("evaluate", finished_run, "--split", "validation", "--round", 1, "--json") == 0
    other = json.loads(capsys.readouterr().out)
    assert other["split"] == "validation"
    assert other["losses"] != told["losses"]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_evaluate_refuses_a_round_whose_states_are_gone(finished_run, capsys):
    assert call("evaluate", finished_run, "--round", 7) == 2
    assert "round 7 is not kept; the rounds kept for 'own' are 1, 2" in capsys.readouterr().err


def test_generate_answers_a_prompt_and_every_line_of_stdin(finished_run, capsys, monkeypatch):
    assert call("generate", finished_run, "--client", "a", "ask 1a") == 0
    once = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("ask 1a\n\nask 2a\n"))
    assert call("generate", finished_run, "--client", "a", "--json") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["ask 1a", "ask 2a"]
    assert answers[0]["answer"] + "\n" == once


def test_generate_goes_on_from_question_to_question_on_a_terminal(
    finished_run, capsys, monkeypatch
):
    typed = iter(["ask 1a", "ask 2a", ""])
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert call("generate", finished_run, "--client", "a", "--column", "shared") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_generate_needs_no_data_folder(run_flags, tmp_path, capsys):
    mine = write_clients(tmp_path / "mine")
    run = tmp_path / "r"
    assert call("run", *run_flags, "--data", mine, "--rounds", 1, "--out", run, "--quiet") == 0
    mine.rename(tmp_path / "gone")
    assert call("generate", run, "--client", "a", "ask") == 0
    assert call("evaluate", run) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["fedalt", "individual"])
def test_export_writes_a_folder(finished_run, tmp_path, capsys, what):
    out = tmp_path / "mine"
    assert call("export", finished_run, "--client", "b", "--out", out, "--format", what) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "adapter_model.safetensors").is_file()
    assert call("export", finished_run, "--client", "b", "--out", out, "--format", what) == 2


def test_a_column_that_a_run_does_not_have_is_named(run_flags, tmp_path, capsys):
    run = tmp_path / "r"
    assert call("run", *run_flags, "--method", "local", "--rounds", 1, "--out", run, "-q") == 0
    for column, why in (("local", "without the local-only baseline"), ("shared", "shares nothing")):
        assert call("generate", run, "--client", "a", "--column", column, "x") == 2
        assert why in capsys.readouterr().err


def test_methods_are_listed(capsys):
    assert call("methods") == 0
    said = capsys.readouterr().out
    assert 'gate = "mixer"' in said
    assert call("methods", "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() == METHODS.keys()


def test_a_rank_for_nobody_is_refused_before_the_run(run_flags, tmp_path, capsys):
    config = tmp_path / "ranks.toml"
    config.write_text("[method]\nname = 'flexlora'\n[method.ranks]\nanna = 2\n")
    assert call("run", config, *run_flags, "--method", "flexlora", "--out", tmp_path / "r") == 2
    assert "[method.ranks] names 'anna', but the clients are a, b" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_demo_compares_three_ways_goes_on_and_never_overwrites(
    run_flags, tmp_path, monkeypatch, capsys, tiny_model_dir
):
    def small(plan: dict[str, int]):
        return {
            "seeds": list(range(plan["seeds"])),
            "data": {"path": "data", "max_length": 400},
            "model": {"name": str(tiny_model_dir)},
            "rounds": {"rounds": plan["rounds"]},
            "scoring": {"generate": False},
            "methods": [{"name": name, "rank": 1} for name in ("fedalt", "fedit", "local")],
        }

    few = partial(suite.write_suite, train=2, validation=1, test=2)
    monkeypatch.setattr(import_module("fedalt.cli.demo"), "_comparison", small)
    monkeypatch.setattr(suite, "write_suite", few)
    out = tmp_path / "demo"
    assert call("demo", "--out", out, "--seeds", 2, "--rounds", 1, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scores"]["columns"] == ["FedALT", "FedIT", "local"]
    assert len(result["scores"]["clients"]) == 8
    assert len(result["scores"]["mean"]["scores"]["FedIT"]) == 2
    assert (out / "table.md").is_file()
    assert len(result["runs"]) == 6
    assert [Path(page).parent for page in result["reports"]] == [out, out / "fedalt" / "seed-0"]
    assert all("<html" in Path(page).read_text() for page in result["reports"])
    before = adapters_of(out)
    assert call("demo", "--out", out, "--seeds", 1, "--rounds", 1) == 0
    said = capsys.readouterr()
    assert "spread" in said.out
    assert f"{out} stays as it is" in said.err
    assert adapters_of(out) == before
    again = tmp_path / "demo-2"
    (again / "table.json").unlink()
    assert call("demo", "--out", again, "--seeds", 1, "--rounds", 1, "-q") == 0
    assert (again / "table.json").is_file()
    assert not (tmp_path / "demo-3").exists()


def test_the_bars_follow_the_clients_of_a_round():
    drawn = Progress(console=Console(file=io.StringIO(), width=100))
    total, now = drawn.add_task("", total=4), drawn.add_task("", total=None)
    bars = Bars(drawn, total, now, rounds=2)
    bars.on_event(Event("train", 1, "own", "a", 3, 8, 1.25))
    assert drawn.tasks[0].completed == 0
    bars.on_event(Event("train", 1, "own", "b", 8, 8, 1.25))
    bars.on_event(Event("train", 1, "own", "a", 3, 8, 1.25))
    assert drawn.tasks[0].completed == 1
    for client in "ab":  # b was counted when it had trained
        bars.on_record({"kind": "train", "column": "own", "client": client})
    bars.on_record({"kind": "score"})
    assert drawn.tasks[0].completed == 2
    assert drawn.tasks[0].description == "round 2/2"
    assert (drawn.tasks[1].completed, drawn.tasks[1].total) == (3, 8)
    assert drawn.tasks[1].description == "training own, a, loss 1.250"


def test_the_bar_counts_only_clients_that_take_part(tiny_model_dir, clients_dir):
    stays = {"b": {"joins": 2}, "c": {"leaves": 1}}
    prepared = prepare(settings_for(tiny_model_dir, clients_dir, clients=stays))
    arms = len(prepared.parts.arms)
    assert [_trainings(prepared, done) for done in range(4)] == [0, 2 * arms, 3 * arms, 5 * arms]


def test_a_round_is_told_in_one_line_with_its_means_and_the_time_left():
    said = []
    told = RoundLines(4, said.append)
    for client, loss in (("a", 1.0), ("b", 2.0)):
        line = {"round": 1, "client": client, "column": "own", "metrics": {"loss": loss}}
        told.on_record({**line, "kind": "train"})
        told.on_record({**line, "kind": "score", "metrics": {"loss": loss / 2}})
    told.on_record({"kind": "round", "round": 1, "seconds": 60.0})
    told.on_event(Event("test", 3, "own", "a", 1, 2))
    told.on_event(Event("test", 3, "own", "b", 2, 2))
    assert said == [
        "round 2/4: loss own 1.500; validation loss own 0.750; 60 s, 2 min left",
        "testing own after round 4/4",
    ]
