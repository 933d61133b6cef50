"""A run's numbers for trackers, while it runs or afterwards from its record."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedalt.report.tensorboard import writing_tensorboard
from fedalt.report.trackio import writing_trackio
from fedalt.runs.observer import Observer

Line = Mapping[str, Any]


class TrackerName(StrEnum):
    """What can stand behind `--report-to`; the package that it needs is called the same."""

    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"


# Each forgets what it has of a run's folder.
TRACKERS: Mapping[TrackerName, Callable[[Path], AbstractContextManager[Observer]]] = {
    TrackerName.TENSORBOARD: writing_tensorboard,
    TrackerName.TRACKIO: writing_trackio,
}


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Raise ValueError where the package of one is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed: `pip install 'fedalt[{name}]'`")


@contextmanager
def tracking(
    run: Path, names: Iterable[TrackerName], lines: Sequence[Line]
) -> Iterator[list[Observer]]:
    """Trackers of a run that have been sent `lines`, all that counts of its record so far.

    What they had of it is replaced, so a line is there once however often a run goes on.
    """
    with ExitStack() as open_:
        trackers = [open_.enter_context(TRACKERS[name](run)) for name in dict.fromkeys(names)]
        for line in lines:
            for tracker in trackers:
                tracker.on_record(line)
        yield trackers
