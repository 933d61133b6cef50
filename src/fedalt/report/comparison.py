"""Tables of several methods in the form of a paper: methods by tasks, mean, worst, and costs."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.text import Text

from fedalt.core.files import atomic_write
from fedalt.methods.notes import notes_on
from fedalt.report.costs import HEADS, cost_cells
from fedalt.report.gaps import (
    ABOUT_GAPS,
    Gap,
    gaps_csv,
    gaps_markdown,
    gaps_over,
    told_apart,
)
from fedalt.report.sheet import Sheet
from fedalt.report.table import (
    YARDSTICK,
    Row,
    Scored,
    Table,
    Values,
    joined,
    markdown_cell,
    scores_of,
    to_csv,
)
from fedalt.runs.compare import Cost, Entry, Job
from fedalt.runs.folder import open_run
from fedalt.runs.settings import lora_of, method_name

MOST_COLUMNS = 12  # more clients than this are shown by task, if their names tell tasks


@dataclass(frozen=True)
class Results:
    """What finished runs found: for each method the test scores of every seed, and what it took.

    `base`: scores of the base model as it is, by the name of its row.
    """

    entries: Sequence[Entry]
    seeds: Sequence[int]
    scores: Mapping[str, Sequence[Scored]]
    costs: Mapping[str, Sequence[Cost]]
    base: Mapping[str, Scored] = field(default_factory=dict)

    def tables(self) -> dict[str, Table]:
        """Clients by methods: scores and losses."""
        return {"scores": joined(self.scores), "losses": joined(self.scores, losses=True)}

    def grids(self) -> dict[str, "Grid"]:
        """The cells of the tables, and below the methods those of the base model."""
        return {name: _with_base(grid_of(of), self.base) for name, of in self.tables().items()}

    def lines(self) -> Iterator[dict[str, Any]]:
        """One for each method, seed, client and metric; of costs for each method and seed.

        One for each base model and client.
        """
        for base, clients in self.base.items():
            yield from ({"base": base, "client": c, "metrics": m} for c, m in clients.items())
        for label, seeds in self.scores.items():
            for seed, clients in zip(self.seeds, seeds, strict=True):
                at = {"method": label, "seed": seed}
                for client, metrics in clients.items():
                    for metric, value in metrics.items():
                        yield {**at, "client": client, "metric": metric, "value": value}
        for label, costs in self.costs.items():
            for seed, cost in zip(self.seeds, costs, strict=True):
                yield {"method": label, "seed": seed, **asdict(cost)}


@dataclass(frozen=True)
class Cell:
    """A method's scores on a task: for each seed the mean over clients."""

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

    The best of a column is bold where `told_apart` tells it from all others: with fewer than six
    clients nothing ever is.
    """
    columns: dict[str, list[Cell]] = {}
    for task, rows in _tasks(table.clients).items():
        columns[task] = _marked(rows, table)
    columns["mean"] = _marked(table.clients, table)
    worst = max if table.of_losses else min
    columns["worst client"] = [_cell(table.clients, at, worst) for at in range(len(table.columns))]
    rows_of = {
        method: tuple(cells[at] for cells in columns.values())
        for at, method in enumerate(table.columns)
    }
    return Grid(tuple(columns), rows_of, table.of_losses)


def collect(entries: Sequence[Entry], seeds: Sequence[int], jobs: Sequence[Job]) -> Results:
    """The results of methods whose runs have all been finished."""
    from fedalt.report.effort import cost_of  # reads clients' last states, so it needs PyTorch

    runs = {(job.entry.label, job.seed): open_run(job.path) for job in jobs}
    of = {entry.label: [runs[entry.label, seed] for seed in seeds] for entry in entries}
    return Results(
        entries,
        seeds,
        {label: [scores_of(run.lines(), "own") for run in group] for label, group in of.items()},
        {label: [cost_of(run.path) for run in group] for label, group in of.items()},
    )


def write_results(out: Path, results: Results) -> None:
    """Write results.jsonl, table.md, table.csv, gaps.csv and clients.csv."""
    tables, grids = results.tables(), results.grids()
    costs = {label: cost_cells(seeds) for label, seeds in results.costs.items()}
    gaps = gaps_of(results)
    parts = [
        *budget_of(results),
        *(grid_markdown(grid, costs, HEADS) for grid in grids.values()),
        *([ABOUT_GAPS, gaps_markdown(gaps)] if gaps else []),
    ]
    files = {
        "results.jsonl": "".join(f"{json.dumps(line)}\n" for line in results.lines()),
        "table.md": "\n".join(f"{part.rstrip()}\n" for part in parts),
        "table.csv": grid_csv(grids["scores"]),
        "gaps.csv": gaps_csv(gaps),
        "clients.csv": to_csv(tables["scores"]),
    }
    for name, text in files.items():
        atomic_write(out / name, text.encode())


def budget_of(results: Results) -> Iterator[str]:
    """What all methods have in common, where one differs, and how to read the cells."""

    def facts(entry: Entry) -> dict[str, Any]:
        settings = entry.settings
        training, rounds = settings.training, settings.rounds
        return {
            "rounds": rounds.rounds,
            "local epochs": training.local_epochs,
            "batch size": training.batch_size,
            "learning rate": training.lr,
            "rank": lora_of(settings.method).rank,
            "participation": rounds.participation,
            "tested round": rounds.select,
            "model": settings.model.name,
            "data": settings.data.path.name,
        }

    first, *others = results.entries
    common = facts(first)
    words = ", ".join(f"{key} {value}" for key, value in common.items())
    seeds = ", ".join(map(str, results.seeds))
    yield f"{words}; seeds {seeds}; cells are means ± standard deviations over seeds."
    for entry in others:
        own = {key: value for key, value in facts(entry).items() if value != common[key]}
        if own:
            yield f"{entry.label}: {', '.join(f'{key} {value}' for key, value in own.items())}."
    for entry in results.entries:
        for note in notes_on(entry.settings.method, entry.settings.rounds.rounds):
            yield f"{entry.label}: {note}."
    if results.base:
        yield "base: the base model without any adapter, scored once; it takes part in no test."
    parts = {label: _parts(costs[0].trained) for label, costs in results.costs.items()}
    if trained := "; ".join(f"{label} {part}" for label, part in parts.items() if part):
        yield f"What a client trains at any time, in numbers by part: {trained}."
    yield (
        "Bold: best of its column, and told from all others by Wilcoxon's signed-rank test over "
        "clients (means over their seeds), p < 0.05 after Holm's correction, metric by metric; no "
        "column of fewer than six clients has any. Trainable numbers are all that a client trains, "
        "steps those of all rounds, + those before it serves. Bytes are means per client and "
        "round, seconds are those of training, peak memory is the process's."
    )


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


def grid_markdown(grid: Grid, costs: Mapping[str, Sequence[str]], heads: Sequence[str]) -> str:
    """The grid as Markdown, with the costs of each method in further columns under `heads`."""
    lines = [["method", *map(markdown_cell, grid.columns), *heads]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])
    for method, cells in grid.rows.items():
        shown = [
            f"**{shown_cell(grid, cell)}**" if cell.bold else shown_cell(grid, cell)
            for cell in cells
        ]
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


def gaps_of(results: Results) -> list[Gap]:
    """Each method's gaps to local-only, if that is there, and to the best of each table's means."""
    named = {entry.label: method_name(entry.settings.method) for entry in results.entries}
    alone = [label for label, name in named.items() if name == YARDSTICK]
    gaps: dict[tuple[str, str, str], Gap] = {}
    for table in results.tables().values():
        means = [cells[-2].seeds for cells in grid_of(table).rows.values()]
        ranked = sorted(zip(table.columns, means, strict=True), key=lambda pair: fmean(pair[1]))
        best = ranked[0 if table.of_losses else -1][0]
        for over in dict.fromkeys([*alone, best]):
            for gap in gaps_over(table, over):
                gaps.setdefault((gap.family, gap.over, gap.method), gap)
    return list(gaps.values())


def _with_base(grid: Grid, base: Mapping[str, Scored]) -> Grid:
    """The grid with a row for each base model, which takes part in no test."""
    rows = dict(grid.rows)
    for label, scores in base.items():
        own = grid_of(joined({label: [scores]}, losses=grid.of_losses))
        cells = dict(zip(own.columns, own.rows[label], strict=True))
        rows.setdefault(label, tuple(cells.get(column, Cell(())) for column in grid.columns))
    return Grid(grid.columns, rows, grid.of_losses)


def _parts(trained: Mapping[str, int]) -> str:
    return ", ".join(f"{slot} {count}" for slot, count in sorted(trained.items()))


def _tasks(clients: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """Rows by column: each client, or each task where clients are TASK-0, TASK-1 and many."""
    if len(clients) <= MOST_COLUMNS:
        return {row.name: [row] for row in clients}
    grouped = groupby(clients, key=lambda row: re.sub(r"-\d+$", "", row.name))
    return {task: list(rows) for task, rows in grouped}


def _cell(rows: Sequence[Row], at: int, fold: Callable[[Values], float] = fmean) -> Cell:
    """The scores of one method on those clients of a column that it had."""
    values = [row.scores[at] for row in rows if row.scores[at]]
    return Cell(tuple(fold(seed) for seed in zip(*values, strict=True)))


def _marked(rows: Sequence[Row], table: Table) -> list[Cell]:
    """The cells of a column, the best one bold where the test supports it."""
    sign = -1 if table.of_losses else 1
    cells = [_cell(rows, at) for at in range(len(table.columns))]
    scored = [at for at, cell in enumerate(cells) if cell.seeds]
    ranked = sorted(scored, key=lambda at: -sign * fmean(cells[at].seeds))
    if len(ranked) > 1:
        best, *others = ranked
        bold = told_apart(rows, best, others, sign=sign)
        cells[best] = Cell(cells[best].seeds, bold)
    return cells


def shown_cell(grid: Grid, cell: Cell) -> str:
    """A cell as it is shown: mean and spread over the seeds."""
    if not cell.seeds:
        return "–"
    digits = 3 if grid.of_losses else 1
    mean = f"{fmean(cell.seeds):.{digits}f}"
    return mean if len(cell.seeds) == 1 else f"{mean} ± {stdev(cell.seeds):.{digits}f}"
