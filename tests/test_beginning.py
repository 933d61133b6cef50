"""A run that was killed before it was one is begun anew; any other folder in use is refused."""

import json
import shutil

import pytest
from commands import call

from fedalt.runs.beginning import create
from fedalt.runs.folder import StoreError, open_run

SETTINGS = "seed = 0\n"
UNFINISHED = ".0123456789abcdef.tmp"


@pytest.mark.parametrize(
    "left",
    [
        {},
        {UNFINISHED: "seed"},
        {"settings.toml": SETTINGS},
        {"settings.toml": SETTINGS, UNFINISHED: "{"},
    ],
)
def test_what_a_killed_beginning_has_left_is_begun_anew(tmp_path, left):
    for name, text in {".lock": "", **left}.items():
        (tmp_path / name).write_text(text)
    create(tmp_path, SETTINGS, {})
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"seed": 0}
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "settings.toml", "run.json"}
    with pytest.raises(StoreError, match=r"is not empty; `fedalt resume .*` continues it"):
        create(tmp_path, SETTINGS, {})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("settings.toml", "seed = 1\n"),
        ("notes.txt", ""),
        ("mine.tmp", ""),
        ("rounds.jsonl", ""),
        ("examples.jsonl", ""),
        ("clients/a/0000.safetensors", ""),
        (f"{UNFINISHED}/mine", ""),
    ],
)
def test_a_folder_with_anything_else_is_refused_and_left_as_it_is(tmp_path, name, text):
    (tmp_path / "settings.toml").write_text(SETTINGS)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(StoreError, match="exists already and is not empty"):
        create(tmp_path, SETTINGS, {})
    assert (tmp_path / name).read_text() == text
    assert not (tmp_path / "run.json").exists()


def test_the_command_that_was_killed_between_its_first_two_files_begins_again(
    run_flags, finished_run, tmp_path, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished_run / "settings.toml", run)
    (run / UNFINISHED).write_text("{")
    assert call("resume", run) == 2
    assert "the command that began it begins it anew" in capsys.readouterr().err
    words = ("--out", run, "--quiet")
    assert call("run", *run_flags, "--rounds", 1, *words) == 2  # other settings
    assert "is not empty" in capsys.readouterr().err
    assert call("run", *run_flags, "--rounds", 2, *words) == 0
    assert open_run(run).rounds_done() == 2
