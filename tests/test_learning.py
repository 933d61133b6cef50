"""A run that learnt nothing says so and what to try; a run that learnt does not."""

import json

import pytest
from commands import call
from report_records import recommit
from runs_for_tests import write_clients

from fedalt.report.learning import nothing_learnt
from fedalt.runs.record import FORMAT

SETTINGS = "[data]\npath = 'd'\n[training]\nlr = 3e-4\n[rounds]\nrounds = 20\n"


def recorded(folder, *, train=(), validation=(), test=None):
    """A run's folder with these losses, client by client, and these metrics on test data."""
    folder.mkdir()
    lines = []
    for client in "ab":
        about = {"client": client, "column": "own"}
        for kind, split, losses in (("train", None, train), ("score", "validation", validation)):
            lines += [
                {"kind": kind, "split": split, **about, "round": n, "metrics": {"loss": loss}}
                for n, loss in enumerate(losses)
            ]
        if test is not None:
            metrics = {"loss": 1.0, **test}
            lines.append(
                {"kind": "score", "split": "test", **about, "round": 1, "metrics": metrics}
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rounds.jsonl").write_text(text)
    (folder / "run.json").write_text(json.dumps({"format": FORMAT}))
    (folder / "settings.toml").write_text(SETTINGS)
    recommit(folder, rounds_done=9, tested=True)
    return folder


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"train": [4, 3], "test": {"rougeL": 0.0}}, ["every test score is 0", "--lr 0.0009"]),
        ({"train": [4, 3], "test": {"accuracy": 0.0}}, ["every test score is 0", "--rounds 40"]),
        ({"train": [4, 9], "test": {"rougeL": 0.0}}, ["4.00 to 9.00", "--lr 0.0001 instead"]),
        ({"train": [4, 4.0], "test": {"rougeL": 3.0}}, ["has not fallen", "higher"]),
        ({"train": [4, 7.0]}, ["has not fallen", "lower", "4.00 to 7.00"]),
        ({"train": [0.7, 0.7], "test": {"accuracy": 0.5}}, ["has not fallen"]),
        ({"train": [4, 1], "validation": [3, 4, 5], "test": {"rougeL": 9.0}}, ["carries over"]),
    ],
)
def test_what_was_not_learnt_is_said_with_what_to_try(tmp_path, record, said):
    sentence = nothing_learnt(recorded(tmp_path / "r", **record))
    for each in (*said, "more data", "larger base model than 'tiny'"):
        assert each in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "record",
    [
        {"train": [4, 1], "validation": [4, 1], "test": {"rougeL": 40.0}},
        {"train": [4, 3.5], "test": {"rougeL": 2.0}},
        {"train": [0.02, 0.02], "test": {"accuracy": 0.6}},
        {"train": [0.5, 0.5], "test": {"accuracy": 0.9}},
        {"train": [4, 0.1], "validation": [1, 1.5, 2], "test": {"rougeL": 90.0}},
        {"train": [4, 1], "validation": [3, 1, 5], "test": {"rougeL": 9.0}},
        {"train": [4], "validation": [4], "test": {"rougeL": 10.0}},
        {"train": [4, 1]},
        {},
    ],
)
def test_a_run_that_learnt_or_cannot_tell_says_nothing(tmp_path, record):
    assert nothing_learnt(recorded(tmp_path / "r", **record)) == ""


def test_runs_of_the_command_say_it_or_not(run_flags, tmp_path, capsys):
    words = ["run", *run_flags, "--no-yardstick"]
    assert call(*words, "--lr", "1e-12", "--rounds", "2", "--out", tmp_path / "bad") == 0
    assert "nothing was learnt" in capsys.readouterr().err
    assert (
        call(*words, "--lr", "1e-2", "--no-generate", "--rounds", "6", "--out", tmp_path / "good")
        == 0
    )
    assert "nothing was learnt" not in capsys.readouterr().err


def test_python_warns_too(tiny_model_dir, tmp_path):
    import fedalt

    data = write_clients(tmp_path / "d")
    table = {
        "data": {"path": str(data), "max_length": 60},
        "model": {"name": str(tiny_model_dir), "device": "cpu"},
        "training": {"lr": 1e-12},
        "rounds": {"rounds": 2},
        "scoring": {"max_new_tokens": 3},
    }
    with pytest.warns(UserWarning, match="nothing was learnt"):
        fedalt.run(table, out=tmp_path / "r")
