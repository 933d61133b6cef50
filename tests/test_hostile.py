"""Hostile answers and calls: none counts, none stops a round, none changes a client's disk."""

from pathlib import Path

import pytest
from hostile import ANSWERS, CALLS
from hostile_federation import Recorded, hostile_answers, hostile_calls, record

from fedalt.runs.setup import Parts


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorded, Parts]:
    return record(tmp_path_factory.mktemp("hostile"), "fedalt")


def test_hostile_answers_are_as_good_as_none(
    played: tuple[Recorded, Parts], tmp_path: Path
) -> None:
    recorded, _ = played
    assert hostile_answers(recorded, tmp_path, 200, seed=1) == []
    assert recorded.counts.keys() == ANSWERS.keys()


def test_hostile_calls_are_answered_and_change_nothing(
    played: tuple[Recorded, Parts], tmp_path: Path
) -> None:
    counts, wrong = hostile_calls(*played, tmp_path, 300, seed=1)
    assert wrong == []
    assert counts.keys() == CALLS.keys()


@pytest.mark.long
@pytest.mark.parametrize("method", ["fedalt", "fedit", "fedlease", "flexlora"])
def test_thousands_of_hostile_answers_and_calls(tmp_path: Path, method: str) -> None:
    recorded, parts = record(tmp_path, method)
    assert hostile_answers(recorded, tmp_path / "plays", 2_500, seed=7) == []
    counts, wrong = hostile_calls(recorded, parts, tmp_path / "calls", 2_500, seed=7)
    assert wrong == []
    assert counts.total() == 2_500
