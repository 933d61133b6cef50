"""`fedalt report`: one HTML file that shows a run or a comparison."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedalt.cli.flags import AsJson, Quiet
from fedalt.cli.output import note, show_json

if TYPE_CHECKING:
    from fedalt.report.parts import Page

RESULTS: Final = "results.jsonl"


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
    page = _page(path)
    file = out or path / "report.html"
    write_page(page, file)
    saved = save_figures(page, figures) if figures else []
    if as_json:
        show_json({"report": str(file), "figures": [str(file) for file in saved]})
        return
    note(f"{file}, {file.stat().st_size / 1e6:.1f} MB", quiet=quiet)
    if saved:
        note(f"{len(saved)} files of figures in {figures}", quiet=quiet)


def _page(path: Path) -> "Page":
    """The page of a run or a comparison. Raises StoreError for any other folder."""
    from fedalt.core.reading import StoreError
    from fedalt.runs.record import meant_by

    if (path / "run.json").exists():
        from fedalt.report.records import read_record
        from fedalt.report.run_page import run_page

        return run_page(read_record(path))
    if (path / RESULTS).exists():
        from fedalt.report.compared_page import comparison_page

        return comparison_page(path)
    raise StoreError(
        f"{path} is neither a run's folder (no run.json) nor a comparison's (no {RESULTS}, "
        f"which `fedalt compare` writes at its end){meant_by(path)}"
    )
