"""How long a run is: what is shown at its end, lengths and rounds that it cannot have."""

from pathlib import Path

import pytest
from commands import call
from runs_for_tests import settings_for, write_clients

from fedalt.runs.folder import StoreError
from fedalt.runs.length import set_rounds
from fedalt.runs.lifecycle import serving, start_run
from fedalt.runs.membership import join
from fedalt.runs.settings import SettingsError
from fedalt.runs.setup import prepare


def test_a_run_that_is_not_tested_shows_its_validation_however_it_came_to_its_end(
    run_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "untested"
    assert call("run", *run_flags, "--rounds", 1, "--no-test", "--out", run, "--quiet") == 0
    assert "validation data" in capsys.readouterr().out
    for rounds in (1, 2):  # finished already, and made longer
        assert call("resume", run, "--rounds", rounds, "--quiet") == 0
        said = capsys.readouterr()
        assert "validation data" in said.out
        assert "no client has" not in said.err


def test_a_run_that_cannot_go_on_keeps_its_length(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_clients(tmp_path / "data", ("a", "b"))
    settings = settings_for(tiny_model_dir, data, rounds={"rounds": 1})
    run = start_run(prepare(settings), tmp_path / "run").path
    write_clients(data, ("c",))
    assert call("resume", run, "--rounds", 2) == 2
    assert "began with other client data" in capsys.readouterr().err
    assert call("resume", run) == 0
    assert "is finished: all its rounds are done and tested" in capsys.readouterr().err


def test_a_length_that_a_run_cannot_have_leaves_it_as_it_is(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = write_clients(tmp_path / "data", ("a", "b"))
    stays = {name: {"leaves": 2} for name in "ab"}
    settings = settings_for(tiny_model_dir, data, rounds={"rounds": 2}, clients=stays)
    run = start_run(prepare(settings), tmp_path / "run").path
    before = (run / "settings.toml").read_bytes()
    with pytest.raises(SettingsError, match="nobody takes part in round 3"):
        set_rounds(run, 4)
    assert (run / "settings.toml").read_bytes() == before


def test_a_newcomer_has_no_model_of_a_round_before_it_came(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = write_clients(tmp_path / "data", ("a", "b"))
    settings = settings_for(tiny_model_dir, data, rounds={"rounds": 2, "select": "last"})
    prepared = prepare(settings)
    run = start_run(prepared, tmp_path / "run").path
    join(run, write_clients(tmp_path / "new", ("c",)))
    assert serving(prepared.parts, run, "c", "own", 1).tree
    for column in ("own", "local"):
        with pytest.raises(StoreError, match="client 'c' has joined after round 1"):
            serving(prepared.parts, run, "c", column, 0)
