"""Methods by tasks, as cells to be shown: for a terminal, as Markdown, as CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from rich.text import Text

from fedalt.report.gaps import Gap, shown_gaps
from fedalt.report.sheet import Sheet, csv_text, markdown, markdown_cell
from fedalt.report.table import Values, shown_values


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
    rows = []
    for method, cells in grid.rows.items():
        shown = [
            f"**{shown_cell(grid, cell)}**" if cell.bold else shown_cell(grid, cell)
            for cell in cells
        ]
        shown += [shown_gaps(to.get(method, ())) for to in grid.gaps.values()]
        rows.append([markdown_cell(method), *shown, *costs.get(method, [""] * len(heads))])
    return markdown(["method", *map(markdown_cell, (*grid.columns, *grid.gaps)), *heads], rows)


def grid_csv(grid: Grid) -> str:
    """Mean and deviation over the seeds of every cell."""
    rows = []
    for method, cells in grid.rows.items():
        for column, cell in zip(grid.columns, cells, strict=True):
            spread = stdev(cell.seeds) if len(cell.seeds) > 1 else ""
            mean = fmean(cell.seeds) if cell.seeds else ""
            rows.append([method, column, mean, spread, len(cell.seeds), cell.bold])
    heads = ("method", "column", "mean", "deviation", "seeds", "best_and_significant")
    return csv_text(heads, rows)


def shown_cell(grid: Grid, cell: Cell) -> str:
    """A cell as it is shown."""
    return shown_values(cell.seeds, 3 if grid.of_losses else 1)
