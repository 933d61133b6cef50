"""The last line of a run's record: what is known from its clients' states, computed once."""

from collections.abc import Callable
from dataclasses import asdict

from fedalt.engine.schedule import Line, Progress
from fedalt.runs.effort import effort_of
from fedalt.runs.folder import RunFolder
from fedalt.runs.record import summary_in
from fedalt.runs.settings import Settings
from fedalt.runs.similarity import similarity_of


def summarise(folder: RunFolder, settings: Settings, on_record: Callable[[Line], None]) -> None:
    """Add its summary to the record of a tested run that has none; use it within `locked`."""
    progress = folder.progress()
    if not progress.tested or is_summarised(folder, progress):
        return
    line = {
        "kind": "summary",
        "round": progress.rounds_done - 1,
        "effort": asdict(effort_of(folder, settings)),
        "similarity": similarity_of(folder, settings, progress),
    }
    folder.record(line)
    on_record(line)
    folder.commit(progress)


def is_summarised(folder: RunFolder, progress: Progress) -> bool:
    """Whether a run has been tested and has a summary; one made longer needs another."""
    summary = summary_in(folder.lines())
    last = progress.rounds_done - 1
    return progress.tested and summary is not None and summary["round"] == last
