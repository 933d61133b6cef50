"""Methods by tasks, as cells to be shown: for a terminal, as Markdown, as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from rich.text import Text

from fedalt.report.gaps import Gap, shown_gaps
from fedalt.report.sheet import Sheet
from fedalt.report.table import Values, markdown_cell


@dataclass(frozen=True)
class Cell:
    """A method's scores on a task: for each seed the mean over clients."""

    seeds: Values
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """Cells by method (rows) and column; the columns are tasks, then the mean and the worst.

    `gaps` hold, by what stands over them, the methods' gaps to another one, metric by metric.
    """

    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]
    of_losses: bool
    gaps: Mapping[str, Mapping[str, Sequence[Gap]]] = field(default_factory=dict)


def draw_grid(grid: Grid, title: str) -> Sheet:
    """The grid for a terminal."""
    rows: list[list[str | Text]] = [
        [
            method,
            *(Text(shown_cell(grid, cell), style="bold" if cell.bold else "") for cell in cells),
        ]
        for method, cells in grid.rows.items()
    ]
    return Sheet(["method", *grid.columns], rows, title)


def draw_gaps(grid: Grid, title: str) -> Sheet:
    """The gaps of a grid for a terminal."""
    rows = [
        [method, *(shown_gaps(to.get(method, ())) for to in grid.gaps.values())]
        for method in grid.rows
    ]
    return Sheet(["method", *grid.gaps], rows, title)


def grid_markdown(grid: Grid, costs: Mapping[str, Sequence[str]], heads: Sequence[str]) -> str:
    """The grid as Markdown, with the costs of each method in further columns under `heads`."""
    lines = [["method", *map(markdown_cell, (*grid.columns, *grid.gaps)), *heads]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])
    for method, cells in grid.rows.items():
        shown = [
            f"**{shown_cell(grid, cell)}**" if cell.bold else shown_cell(grid, cell)
            for cell in cells
        ]
        shown += [shown_gaps(to.get(method, ())) for to in grid.gaps.values()]
        lines.append([markdown_cell(method), *shown, *costs.get(method, [""] * len(heads))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def grid_csv(grid: Grid) -> str:
    """Mean and deviation over the seeds of every cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "column", "mean", "deviation", "seeds", "best_and_significant"])
    for method, cells in grid.rows.items():
        for column, cell in zip(grid.columns, cells, strict=True):
            spread = stdev(cell.seeds) if len(cell.seeds) > 1 else ""
            mean = fmean(cell.seeds) if cell.seeds else ""
            writer.writerow([method, column, mean, spread, len(cell.seeds), cell.bold])
    return text.getvalue()


def shown_cell(grid: Grid, cell: Cell) -> str:
    """A cell as it is shown: mean and spread over the seeds."""
    if not cell.seeds:
        return "–"
    digits = 3 if grid.of_losses else 1
    mean = f"{fmean(cell.seeds):.{digits}f}"
    return mean if len(cell.seeds) == 1 else f"{mean} ± {stdev(cell.seeds):.{digits}f}"
