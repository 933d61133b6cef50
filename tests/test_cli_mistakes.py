"""Wrong words, bad data, damaged runs and being stopped: one clear sentence, nothing lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import call
from runs_for_tests import adapters_of, scores_of, write_clients

from fedalt.cli import main
from fedalt.runs.folder import locked


def break_line(folder: Path) -> None:
    lines = (folder / "b.train.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-1]
    (folder / "b.train.jsonl").write_text("\n".join(lines))


def drop_field(folder: Path) -> None:
    with (folder / "c.test.jsonl").open("a") as file:
        file.write('{"instruction": "x"}\n')


MISTAKES = {
    "empty file": (
        lambda folder: (folder / "a.train.jsonl").write_text(""),
        "a.train.jsonl: holds no records",
    ),
    "broken line": (break_line, "b.train.jsonl:3: not valid JSON"),
    "missing field": (drop_field, "c.test.jsonl:13: field 'output' is missing"),
    "two clients with one name": (
        lambda folder: (folder / "A.train.jsonl").write_bytes(
            (folder / "a.train.jsonl").read_bytes()
        ),
        "differs from",
    ),
    "test without train": (
        lambda folder: (folder / "a.train.jsonl").unlink(),
        "'a' has test data but no train file",
    ),
    "too long an answer": (
        lambda folder: (folder / "a.test.jsonl").write_text(
            json.dumps({"instruction": "x", "output": "y" * 90}) + "\n"
        ),
        "client 'a', test record 1: the answer is",
    ),
}


@pytest.mark.parametrize(("spoil", "complaint"), MISTAKES.values(), ids=MISTAKES)
def test_bad_data_are_one_clear_error_and_leave_no_run(
    run_flags, tmp_path, capsys, spoil, complaint
):
    mine = write_clients(tmp_path / "mine")
    spoil(mine)
    assert call("run", *run_flags, "--data", mine, "--out", tmp_path / "r") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert complaint in said
    assert "Traceback" not in said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--method", "fedlat"], "no method 'fedlat'"),
        (["--rank", "0"], "rank=0, but"),
        (["--rounds", "0"], "rounds=0, but"),
        (["--validation", "1"], "validation=1.0, but"),
        (["--select", "first"], "expected one of 'best', 'last', got 'first'"),
        (["--targets", "q_porj"], "close names: q_proj"),
        (["--device", "cu"], "cannot use the device 'cu'"),
        (["--model", "nowhere/at/all"], "no model folder 'nowhere/at/all'"),
        (["absent.toml"], "absent.toml: there is no such file"),
        (["--rank", "many"], "--rank"),
        (["--ranks", "1"], "--ranks"),
    ],
)
def test_wrong_words_are_one_clear_error(
    run_flags, tmp_path, monkeypatch, capsys, words, complaint
):
    monkeypatch.chdir(tmp_path)
    assert call("run", *run_flags, *words) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_typo_in_the_file_names_file_key_and_what_is_close(tmp_path, capsys, clients_dir):
    config = tmp_path / "c.toml"
    config.write_text(f"[data]\npath = '{clients_dir}'\n[training]\nbatchsize = 1\n")
    assert call("run", config) == 2
    expected = f"error: {config}: [training]: unknown key 'batchsize'; did you mean batch_size?\n"
    assert capsys.readouterr().err == expected


def test_a_model_folder_without_tokenizer_is_named(run_flags, tmp_path, tiny_model_dir, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((tiny_model_dir / name).read_bytes())
    assert call("run", *run_flags, "--model", model) == 2
    assert f"the model folder '{model}' has no tokenizer" in capsys.readouterr().err


def test_one_client_is_trained_and_told_that_nobody_shares(run_flags, tmp_path, capsys):
    mine = write_clients(tmp_path / "mine", "a")
    assert call("run", *run_flags, "--data", mine, "--rounds", 2, "--out", tmp_path / "r") == 0
    assert capsys.readouterr().err.count("only one client") == 1
    assert (
        call("run", *run_flags, "--data", mine, "--method", "local", "--out", tmp_path / "s") == 0
    )
    assert "only one client" not in capsys.readouterr().err


def test_two_clients_are_told_what_they_see_of_each_other(run_flags, tmp_path, capsys):
    mine = write_clients(tmp_path / "mine", "ab")
    assert call("run", *run_flags, "--data", mine, "--rounds", 1, "--out", tmp_path / "r") == 0
    assert "work out the other's adapter" in capsys.readouterr().err


def test_a_client_without_test_data_is_trained_but_has_no_row(run_flags, tmp_path, capsys):
    mine = write_clients(tmp_path / "mine")
    (mine / "b.test.jsonl").unlink()
    assert call("run", *run_flags, "--data", mine, "--rounds", 1, "--out", tmp_path / "r") == 0
    said = capsys.readouterr()
    assert "without test data: b" in said.err
    assert not re.search(r"^ *b ", said.out, re.MULTILINE)
    assert (tmp_path / "r" / "clients" / "b" / "0000.safetensors").is_file()
    for client in "ac":
        (mine / f"{client}.test.jsonl").unlink()
    assert call("run", *run_flags, "--data", mine, "--rounds", 1, "--out", tmp_path / "s") == 0
    assert "no client has test data, so there is no table" in capsys.readouterr().err


def test_an_occupied_folder_is_refused_before_anything_is_loaded(run_flags, finished_run, capsys):
    before = adapters_of(finished_run)
    assert call("run", *run_flags, "--model", "nowhere/at/all", "--out", finished_run) == 2
    expected = (
        f"{finished_run} exists already and is not empty; `fedalt resume {finished_run}` continues"
    )
    assert expected in capsys.readouterr().err
    assert adapters_of(finished_run) == before


def copy_of(run: Path, to: Path) -> Path:
    for path in run.rglob("*"):
        if path.is_file():
            (to / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(run)).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("run.json", '{"format": 99}', "run format 99, but this version reads 3"),
        ("run.json", '{"format": 2}', "this run is of format 2, and this version reads 3"),
        ("run.json", "{", "run.json is damaged: it is not JSON"),
        ("progress.json", "{", "progress.json is damaged: it is not JSON"),
        ("progress.json", "{}", "progress.json is damaged: it lacks 'best'"),
        ("settings.toml", "x = 1", "unknown key 'x'"),
        ("clients/a/0001.safetensors", "x", "0001.safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_damaged_run_is_one_clear_error(
    finished_run, tmp_path, capsys, command, file, content, complaint
):
    run = copy_of(finished_run, tmp_path / "r")
    for path in [run / file, *(run / "clients" / "a").glob("*")][: 3 if "clients" in file else 1]:
        path.write_text(content)
    words = ["--client", "a", "x"] if command == "generate" else []
    assert call(command, run, *words) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_folder_that_is_no_run_is_refused_and_not_made(tmp_path, capsys, command):
    assert call(command, tmp_path / "absent") == 2
    assert "is not a run's folder" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


def test_an_unknown_client_is_answered_with_those_there_are(finished_run, capsys):
    assert call("generate", finished_run, "--client", "x", "hello") == 2
    assert "has no client 'x', but a, b, c" in capsys.readouterr().err


def test_a_simulation_goes_on_with_the_settings_it_has_begun_with_or_says_so(
    finished_run, tmp_path, capsys
):
    text = (finished_run / "settings.toml").read_text()
    same, other = tmp_path / "same.toml", tmp_path / "other.toml"
    same.write_text(text)
    other.write_text(re.sub(r"(?m)^lr = .*$", "lr = 0.5", text))
    assert call("simulate", same, "--out", finished_run) == 0
    assert call("simulate", other, "--out", finished_run) == 2
    complaint = capsys.readouterr().err
    assert f"{finished_run} was run with other settings: [training] lr was" in complaint
    assert "but is 0.5 now" in complaint


def test_a_second_process_on_a_run_is_refused(finished_run, capsys):
    with locked(finished_run):
        assert call("resume", finished_run) == 2
    assert f"another process is using {finished_run}" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    run_flags, tmp_path, monkeypatch, capsys, finished_run
):
    run = tmp_path / "r"
    with monkeypatch.context() as patched:
        real, calls = os.fsync, iter(range(1000))

        def full(descriptor: int) -> None:
            if next(calls) > 20:
                raise OSError(28, "No space left on device")
            real(descriptor)

        patched.setattr(os, "fsync", full)
        assert call("run", *run_flags, "--rounds", 2, "--out", run) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert f"`fedalt resume {run}` repeats that and continues" in said
    assert call("resume", run, "--quiet") == 0
    assert adapters_of(run) == adapters_of(finished_run)


def test_ctrl_c_in_a_round_says_how_to_go_on_and_resuming_ends_the_same(run_flags, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    words = ["run", *run_flags, "--rounds", "4", "--lr", "1e-2"]
    assert call(*words, "--out", straight, "--quiet") == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "fedalt", *words, "--out", stopped],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Tests that a shell runs in the background hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while not (stopped / "progress.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(rf"stopped in (round [1-3]|the test).*; `fedalt resume {stopped}`", said)
    assert "Traceback" not in said
    assert call("resume", stopped, "--quiet") == 0
    assert adapters_of(stopped) == adapters_of(straight)
    assert scores_of(stopped) == scores_of(straight)


def test_a_loss_that_explodes_tells_what_to_change(run_flags, tmp_path, capsys):
    run = tmp_path / "r"
    assert call("run", *run_flags, "--lr", "1e30", "--out", run) == 2
    said = capsys.readouterr().err
    assert "the loss became nan" in said
    assert f"change {run / 'settings.toml'}" in said
    assert "unless a model diverged in a round that is done" in said
    late = (*run_flags, "--lr", "1e30", "--batch-size", "64", "--rounds", "1", "--validation", "0")
    assert call("run", *late, "--out", tmp_path / "late") == 2
    said = capsys.readouterr().err
    assert "its model has diverged, so start another run with a lower learning rate" in said


def test_our_own_mistakes_exit_with_1_and_leave_a_traceback_in_a_file(monkeypatch, capsys):
    def fault(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("fedalt.runs.settings.read_settings", fault)
    assert call("run") == 1
    said = capsys.readouterr().err
    assert "this is a fault in fedalt: KeyError: 'oops'" in said
    file = Path(re.search(r"report it with (\S+);", said)[1])
    assert "KeyError: 'oops'" in file.read_text()
    file.unlink()
    with pytest.raises(KeyError):
        main(["run", "--debug"])


def test_a_library_s_value_error_is_our_mistake_too(monkeypatch, capsys):
    monkeypatch.setattr("fedalt.runs.settings.read_settings", lambda *_: json.loads("{"))
    assert call("run") == 1
    said = capsys.readouterr().err
    assert "this is a fault in fedalt" in said
    Path(re.search(r"report it with (\S+);", said)[1]).unlink()
