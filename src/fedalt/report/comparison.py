"""Tables of several methods in the form of a paper: methods by tasks, mean, worst, and costs."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from fedalt.core.files import atomic_write
from fedalt.methods import METHODS
from fedalt.methods.entries import Entry as MethodEntry
from fedalt.report.costs import HEADS, cost_cells, steps_told
from fedalt.report.gaps import ABOUT_GAPS, Gap, gaps_csv, gaps_markdown, gaps_over, told_apart
from fedalt.report.grid import Cell, Grid, grid_csv, grid_markdown
from fedalt.report.headline import heading
from fedalt.report.table import Row, Scored, Table, Values, joined, to_csv
from fedalt.runs.cells import Cost
from fedalt.runs.view import USUAL, Metric, View

MOST_COLUMNS = 12  # more clients than this are shown by task, if their names tell tasks
_OF_ALL: Final = ("mean", "worst client")  # the last two columns


# What all methods of a comparison mostly have in common, by section and key of their settings.
_BUDGET: Final = {
    "rounds": ("rounds", "rounds"),
    "local epochs": ("training", "local_epochs"),
    "batch size": ("training", "batch_size"),
    "learning rate": ("training", "lr"),
    "rank": ("method", "rank"),
    "participation": ("rounds", "participation"),
    "tested round": ("rounds", "select"),
    "model": ("model", "name"),
    "data": ("data", "path"),
}


@dataclass(frozen=True)
class Compared:
    """A method as a comparison's tables need it: its settings as a whole file has them.

    `notes` are sentences that have to be said beside its scores, None where they are not on record.
    """

    label: str
    settings: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] | None

    @property
    def method(self) -> MethodEntry:
        """What METHODS lists it by."""
        return METHODS.entries[self.settings["method"]["name"]]

    def budget(self) -> dict[str, Any]:
        """What it may use, by the words for it."""
        facts = {words: self.settings[part][key] for words, (part, key) in _BUDGET.items()}
        return {**facts, "data": Path(facts["data"]).name}


@dataclass(frozen=True)
class Results:
    """What finished runs found: for each method the test scores of every seed, and what it took.

    `base`: scores of the base model as it is, by the name of its row.
    """

    entries: Sequence[Compared]
    seeds: Sequence[int]
    scores: Mapping[str, Sequence[Scored]]
    costs: Mapping[str, Sequence[Cost]]
    view: View = USUAL
    base: Mapping[str, Scored] = field(default_factory=dict)

    def tables(self) -> dict[str, Table]:
        """Clients by methods: the metric that was asked for, and losses."""
        return {name: joined(self.scores, metric=of) for name, of in self.metrics().items()}

    def metrics(self) -> dict[str, Metric]:
        """What each table is of."""
        return {"scores": self.view.metric, "losses": "loss"}

    def lines(self) -> Iterator[dict[str, Any]]:
        """The view; one for each base model and client; for each method, seed, client and metric.

        At the end one of costs for each run, and one of notes for each method.
        """
        yield asdict(self.view)
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
        yield from ({"method": entry.label, "notes": entry.notes} for entry in self.entries)


def grid_of(table: Table) -> Grid:
    """The cells of a table of clients by methods; lower is better in a table of losses.

    The best of a column is bold where `told_apart` tells it from all others: with fewer than six
    clients nothing ever is.
    """
    columns: dict[str, list[Cell]] = {}
    for task, rows in _tasks(table.clients).items():
        columns[task] = _marked(rows, table)
    mean, lowest = _OF_ALL
    columns[mean] = _marked(table.clients, table)
    worst = max if table.of_losses else min
    columns[lowest] = [_cell(table.clients, at, worst) for at in range(len(table.columns))]
    rows_of = {
        method: tuple(cells[at] for cells in columns.values())
        for at, method in enumerate(table.columns)
    }
    return Grid(tuple(columns), rows_of, table.of_losses)


def grids_of(results: Results) -> dict[str, Grid]:
    """The grid of each table, with every method's gaps to local-only and to the best."""
    gaps, metrics, grids = gaps_of(results), results.metrics(), {}
    for name, table in results.tables().items():
        families = {row.metric for row in table.clients}
        alone, best = alone_in(results), _best(table)
        heads = {**{label: f"gap to {label}" for label in alone}, best: f"gap to the best, {best}"}
        own = {
            f"{head} (95 %)": {
                method: [
                    gap
                    for gap in gaps
                    if (gap.method, gap.over) == (method, over) and gap.family in families
                ]
                for method in table.columns
            }
            for over, head in heads.items()
        }
        grid = replace(grid_of(table), gaps=own if len(table.columns) > 1 else {})
        grids[name] = _with_base(grid, metrics[name], _of_members(results))
    if grids["scores"].of_losses:  # then there is nothing but losses
        del grids["scores"]
    return grids


def write_results(out: Path, results: Results) -> None:
    """Write results.jsonl, table.md, table.csv, gaps.csv and clients.csv."""
    grids = grids_of(results)
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
        "table.csv": grid_csv(next(iter(grids.values()))),
        "gaps.csv": gaps_csv(gaps),
        "clients.csv": to_csv(results.tables()["scores"], results.seeds),
    }
    for name, text in files.items():
        atomic_write(out / name, text.encode())


def budget_of(results: Results) -> Iterator[str]:
    """What all methods have in common, where one differs, and how to read the cells."""
    first, *others = results.entries
    common = first.budget()
    words = ", ".join(f"{key} {value}" for key, value in common.items())
    seeds = ", ".join(map(str, results.seeds))
    yield f"{words}; seeds {seeds}; cells are means ± standard deviations over seeds."
    yield from steps_told(results.costs, results.view.steps)
    yield from _headed(results)
    for entry in others:
        own = {key: value for key, value in entry.budget().items() if value != common[key]}
        if own:
            yield f"{entry.label}: {', '.join(f'{key} {value}' for key, value in own.items())}."
    for entry in results.entries:
        yield from (f"{entry.label}: {note}." for note in entry.notes or ())
    if any(entry.notes is None for entry in results.entries):
        yield "Notes on single methods are not on record here; `fedalt compare` writes them."
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


def gaps_of(results: Results) -> list[Gap]:
    """Each method's gaps to local-only, if that is there, and to the best of each table's means."""
    gaps: dict[tuple[str, str, str], Gap] = {}
    for table in results.tables().values():
        for over in dict.fromkeys([*alone_in(results), _best(table)]):
            for gap in gaps_over(table, over):
                gaps.setdefault((gap.family, gap.over, gap.method), gap)
    return list(gaps.values())


def alone_in(results: Results) -> list[str]:
    """The methods whose clients train alone."""
    return [entry.label for entry in results.entries if entry.method.local_only]


def _best(table: Table) -> str:
    """The method with the best mean over the clients that it has."""
    means = {
        method: fmean(values)
        for at, method in enumerate(table.columns)
        if (values := [fmean(row.scores[at]) for row in table.clients if row.scores[at]])
    }
    return (min if table.of_losses else max)(means, key=lambda method: means[method])


def _headed(results: Results) -> Iterator[str]:
    """What heads the table where that is not every client's own score."""
    table = results.tables()["scores"]
    clients = {client for seeds in results.scores.values() for seed in seeds for client in seed}
    if results.view.metric != "score":
        of = f"{len(table.clients)} of {len(clients)} clients have it"
        yield f"The first table is of {heading(results.view.metric)}: {of}."


def _with_base(grid: Grid, metric: Metric, base: Mapping[str, Scored]) -> Grid:
    """The grid with a row for each base model, which takes part in no test."""
    rows = dict(grid.rows)
    for label, scores in base.items():
        own = grid_of(joined({label: [scores]}, metric=metric))
        cells = dict(zip(own.columns, own.rows[label], strict=True))
        rows.setdefault(label, tuple(cells.get(column, Cell(())) for column in grid.columns))
    return replace(grid, rows=rows)


def _of_members(results: Results) -> dict[str, Scored]:
    """The base models' scores for the clients that methods have scores of; others have left."""
    members = {client for seeds in results.scores.values() for seed in seeds for client in seed}
    return {
        label: {client: of for client, of in scores.items() if client in members}
        for label, scores in results.base.items()
    }


def _parts(trained: Mapping[str, int]) -> str:
    return ", ".join(f"{slot} {count}" for slot, count in sorted(trained.items()))


def _tasks(clients: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by column: each client, or each task where clients are TASK-0, TASK-1 and many.

    One that is called as a column of the whole has "client" before its name.
    """
    columns: dict[str, list[Row]] = {}
    for row in clients:
        name = row.name if len(clients) <= MOST_COLUMNS else re.sub(r"-\d+$", "", row.name)
        columns.setdefault(f"client {name}" if name in _OF_ALL else name, []).append(row)
    return columns


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
