"""How long a run is: what is shown at its end, and lengths that it cannot have."""

from pathlib import Path

import pytest
from commands import call


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
