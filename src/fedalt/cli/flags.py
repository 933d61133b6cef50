"""Arguments and flags that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print the result alone.", rich_help_panel="Output"),
]
Tensorboard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Also write RUN/tensorboard.", rich_help_panel="Output"),
]
