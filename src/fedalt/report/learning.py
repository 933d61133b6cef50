"""Whether a run has learnt anything, by its own record, and what to try if it has not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from fedalt.report.table import run_table
from fedalt.runs.folder import open_run
from fedalt.runs.settings import Settings, read_settings

Line = Mapping[str, Any]

_FALLEN: Final = 0.98  # of a loss at the beginning; a run that learns is far below it
_RISEN: Final = 1.05
_KNOWN: Final = 0.1  # nats: who begins there has nothing to learn
_GOOD: Final = {"ROUGE-L": 50.0, "accuracy %": 75.0}  # whatever the losses say


def nothing_learnt(path: Path) -> str:
    """A sentence about a finished run that learnt nothing, and what to try; "" for any other.

    That is one whose scores are all 0, or whose loss has not fallen: that of training from the
    first round to the last, or that of validation after its first round.
    """
    lines = open_run(path).lines()
    why, rate = _found(lines)
    return f"{why}; try {_try(read_settings(path / 'settings.toml'), rate)}" if why else ""


def _found(lines: Sequence[Line]) -> tuple[str, str]:
    """What shows that nothing was learnt, if so, and whether the rate is too low or too high."""
    trained = _course([line for line in lines if line["kind"] == "train"])
    scored = [line for line in lines if line["kind"] == "score"]
    validated = _course([line for line in scored if line["split"] == "validation"])
    split = "test" if any(line["split"] == "test" for line in scored) else "validation"
    mean = run_table(lines, split).mean if any(line["split"] == split for line in scored) else None
    good = mean is not None and mean.scores[0] and mean.scores[0][0] >= _GOOD.get(mean.metric, 101)
    rose = trained is not None and trained[1] > trained[0] * _RISEN
    course = "" if trained is None else f" (training loss {trained[0]:.2f} to {trained[1]:.2f})"
    if mean is not None and mean.metric != "loss" and _all_zero(lines, split):
        rate = "lower" if rose else "higher"
        return f"nothing was learnt that shows: every {split} score is 0{course}", rate
    if good:
        return "", ""
    if trained is not None and trained[1] > max(trained[0] * _FALLEN, _KNOWN):
        rate = "lower" if rose else "higher"
        return f"nothing was learnt: the training loss has not fallen{course}", rate
    if validated is not None and validated[1] > validated[0] * _RISEN and validated[2]:
        first, last, _ = validated
        text = f"the validation loss was never below that of its first round ({first:.2f}"
        return f"nothing was learnt that carries over: {text}, {last:.2f} at the end)", "lower"
    return "", ""


def _course(lines: Sequence[Line]) -> tuple[float, float, bool] | None:
    """The own column's mean loss at first and at last, and whether it was lowest at first.

    Client by client, over those that have two or more; None if there are none.
    """
    losses: dict[str, list[float]] = {}
    for line in lines:
        if line["column"] == "own" and "loss" in line["metrics"]:
            losses.setdefault(line["client"], []).append(line["metrics"]["loss"])
    courses = [values for values in losses.values() if len(values) > 1]
    if not courses:
        return None
    lowest = fmean(min(values) for values in courses)
    first, last = fmean(values[0] for values in courses), fmean(values[-1] for values in courses)
    return first, last, lowest > first * _FALLEN


def _all_zero(lines: Sequence[Line], split: str) -> bool:
    rows = run_table(lines, split).clients
    return all(row.scores[0] and max(row.scores[0]) == 0 for row in rows)


def _try(settings: Settings, rate: str) -> str:
    lr, rounds = settings.training.lr, settings.rounds.rounds
    wanted = lr * 3 if rate == "higher" else lr / 3
    more = f"a {rate} learning rate (--lr {wanted:.1g} instead of {lr:g})"
    if rate == "higher":
        more += f", more rounds (--rounds {2 * rounds})"
    return f"{more}, more data, or a larger base model than {settings.model.name!r} (--model)"
