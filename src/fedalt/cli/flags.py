"""Arguments and flags that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from fedalt.report.trackers import TrackerName

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print the result alone.", rich_help_panel="Output"),
]
ReportTo = Annotated[
    list[TrackerName] | None,
    typer.Option(
        "--report-to",
        help="Also write RUN/tensorboard or RUN/trackio; can be repeated.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
