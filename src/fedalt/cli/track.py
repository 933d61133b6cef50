"""`fedalt track`: send a past run to trackers."""

from typing import Annotated

import typer

from fedalt.cli.flags import Quiet, RunPath
from fedalt.cli.output import note
from fedalt.report.trackers import TrackerName


def track(
    path: RunPath,
    report_to: Annotated[
        list[TrackerName], typer.Option("--report-to", help="A tracker; can be repeated.")
    ],
    quiet: Quiet = False,
) -> None:
    """Send the record of a run to trackers; what they had of it is replaced."""
    from fedalt.report.trackers import require_trackers, tracking
    from fedalt.runs.folder import locked, open_run

    folder = open_run(path)
    require_trackers(report_to)
    with locked(path):  # a run that goes on writes to its trackers itself
        lines = folder.lines()
        with tracking(path, report_to, lines):
            pass
    note(f"{len(lines)} lines sent to {', '.join(dict.fromkeys(report_to))}", quiet=quiet)
