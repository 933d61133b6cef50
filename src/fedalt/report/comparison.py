"""Tables of several methods in the form of a paper: methods by tasks, mean, worst, and costs."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table as Drawn
from rich.text import Text
from scipy.stats import wilcoxon

from fedalt.report.table import Row, Table, Values

MOST_COLUMNS = 12  # more clients than this are shown by task, if their names tell tasks
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """A method's scores on a task: one per client and seed, and the means that are shown."""

    pairs: Values
    seeds: Values
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """Cells by method (rows) and column; the columns are tasks, then the mean and the worst."""

    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]
    of_losses: bool


def grid_of(table: Table) -> Grid:
    """The cells of a table of clients by methods; lower is better in a table of losses.

    The best of a column is bold where Wilcoxon's signed-rank test over its (client, seed) pairs
    tells it from the second best, p < 0.05: with fewer than six pairs nothing ever is.
    """
    columns: dict[str, list[Cell]] = {}
    for task, rows in _tasks(table.clients).items():
        columns[task] = _marked([_cell(rows, at) for at in range(len(table.columns))], table)
    columns["mean"] = _marked([_cell(table.clients, at) for at in range(len(table.columns))], table)
    worst = max if table.of_losses else min
    columns["worst client"] = [_cell(table.clients, at, worst) for at in range(len(table.columns))]
    rows_of = {
        method: tuple(cells[at] for cells in columns.values())
        for at, method in enumerate(table.columns)
    }
    return Grid(tuple(columns), rows_of, table.of_losses)


def draw_grid(grid: Grid, title: str) -> Drawn:
    """The grid for a terminal."""
    drawn = Drawn(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    drawn.add_column("method", overflow="fold")
    for name in grid.columns:
        drawn.add_column(name, justify="right", overflow="fold")
    for method, cells in grid.rows.items():
        shown = [Text(_shown(grid, each), style="bold" if each.bold else "") for each in cells]
        drawn.add_row(method, *shown)
    return drawn


def grid_markdown(grid: Grid, costs: Mapping[str, Sequence[str]], heads: Sequence[str]) -> str:
    """The grid as Markdown, with the costs of each method in further columns under `heads`."""
    lines = [["method", *grid.columns, *heads]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])
    for method, cells in grid.rows.items():
        shown = [f"**{_shown(grid, each)}**" if each.bold else _shown(grid, each) for each in cells]
        lines.append([method, *shown, *costs.get(method, [""] * len(heads))])
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


def beats(first: Values, second: Values) -> bool:
    """Whether paired scores tell two methods apart; each pair is one client and seed."""
    if len(first) != len(second) or not first:
        return False
    gaps = np.subtract(first, second)
    if not gaps.any():
        return False
    return bool(wilcoxon(gaps).pvalue < SIGNIFICANT)


def _tasks(clients: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """Rows by column: each client, or each task where clients are TASK-0, TASK-1 and many."""
    if len(clients) <= MOST_COLUMNS:
        return {row.name: [row] for row in clients}
    grouped = groupby(clients, key=lambda row: re.sub(r"-\d+$", "", row.name))
    return {task: list(rows) for task, rows in grouped}


def _cell(rows: Sequence[Row], at: int, fold: Callable[[Values], float] = fmean) -> Cell:
    """The scores of one method on those clients of a column that it had.

    There are no pairs if it had not all of them: the test needs the same clients everywhere.
    """
    values = [row.scores[at] for row in rows if row.scores[at]]
    whole = len(values) == len(rows)
    pairs = tuple(score for scores in values for score in scores) if whole else ()
    return Cell(pairs, tuple(fold(seed) for seed in zip(*values, strict=True)))


def _marked(cells: list[Cell], table: Table) -> list[Cell]:
    """The cells of a column, the best one bold where the test supports it."""
    sign = -1 if table.of_losses else 1
    there = [at for at, cell in enumerate(cells) if cell.seeds]
    ranked = sorted(there, key=lambda at: -sign * fmean(cells[at].seeds))
    if len(ranked) > 1:
        best, second = cells[ranked[0]], cells[ranked[1]]
        cells[ranked[0]] = Cell(best.pairs, best.seeds, beats(best.pairs, second.pairs))
    return cells


def _shown(grid: Grid, cell: Cell) -> str:
    if not cell.seeds:
        return "–"
    digits = 3 if grid.of_losses else 1
    mean = f"{fmean(cell.seeds):.{digits}f}"
    return mean if len(cell.seeds) == 1 else f"{mean} ± {stdev(cell.seeds):.{digits}f}"
