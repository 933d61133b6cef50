"""The drill says by its exit code whether what it checks holds."""

import importlib
import sys
from pathlib import Path

import pytest
from access import REFUSED, Attempt

SCRIPTS = Path(__file__).parents[1] / "scripts"
ALL = [Attempt(what, f"it said: {text}") for what, text in REFUSED.items()]
LET_IN = Attempt("no signature", "200 welcome")


class Silent:
    """In the place of a federation's processes."""

    def start(self, name: str) -> None:
        pass

    def said(self, name: str) -> str:
        return "round 1"

    def kill_all(self) -> None:
        pass


@pytest.mark.parametrize(
    ("tried", "code", "said"),
    [
        (ALL, 0, "nobody was let in"),
        ([*ALL, LET_IN], 1, "no signature: seen was '200 welcome', not '401'"),
        (ALL[1:], 1, f"{ALL[0].what}: nobody has tried it"),
        ([*ALL, Attempt("a new one", "200")], 1, "a new one: seen was '200', not 'anything'"),
    ],
)
def test_who_is_let_in_ends_the_drill_of_access_with_1(
    tried: list[Attempt],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    drill = importlib.import_module("drill")
    monkeypatch.setattr(drill, "found", lambda *_, **__: Silent())
    monkeypatch.setattr(drill, "save_model", lambda path: path)
    monkeypatch.setattr(drill, "attempts", lambda _: tried)
    monkeypatch.setattr(drill.signal, "signal", lambda *_: None)
    monkeypatch.setattr(drill.waits, "PATIENCE", drill.waits.PATIENCE)  # which it changes
    monkeypatch.setattr(sys, "argv", ["drill.py", "--access", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        drill.main()
    told = capsys.readouterr().out
    assert end.value.code == code
    assert said in told
    assert "| no signature | it said: 401 |" in told or LET_IN in tried
