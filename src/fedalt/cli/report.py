"""`fedalt report`: one HTML file that shows a run or a comparison."""

from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet
from fedalt.cli.output import note, show_json


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a comparison.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help="Without it, RUN/report.html."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Save each figure as SVG and PNG too."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a page of scores, curves, mixers, similarities, examples and costs.

    It is a single file that opens anywhere and asks the network for nothing.
    """
    from fedalt.report.page import require_report, save_figures, write_page

    require_report()
    from fedalt.cli.output import hush_libraries

    hush_libraries()
    from fedalt.report.compared_page import RESULTS, comparison_page
    from fedalt.report.records import read_record
    from fedalt.report.run_page import run_page
    from fedalt.runs.folder import StoreError
    from fedalt.runs.record import meant_by

    if (path / "run.json").exists():
        page = run_page(read_record(path))
    elif (path / RESULTS).exists():
        page = comparison_page(path)
    else:
        raise StoreError(
            f"{path} is neither a run's folder (no run.json) nor a comparison's (no {RESULTS}, "
            f"which `fedalt compare` writes at its end){meant_by(path)}"
        )
    file = out or path / "report.html"
    write_page(page, file)
    saved = save_figures(page, figures) if figures else []
    if as_json:
        show_json({"report": str(file), "figures": [str(each) for each in saved]})
        return
    note(f"{file}, {file.stat().st_size / 1e6:.1f} MB", quiet=quiet)
    if saved:
        note(f"{len(saved)} files of figures in {figures}", quiet=quiet)
