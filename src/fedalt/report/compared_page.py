"""A comparison's page: the methods' table, gains by client, and what quality costs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypedDict

from fedalt.core.reading import read_lines
from fedalt.report import compared_figures as figures
from fedalt.report.comparison import Compared, Results, alone_in, budget_of, gaps_of, grids_of
from fedalt.report.costs import HEADS, cost_cells
from fedalt.report.gaps import ABOUT_GAPS, GAP_HEADS, gap_cells, shown_gaps
from fedalt.report.grid import Grid, shown_cell
from fedalt.report.headline import heading
from fedalt.report.parts import Cell, Facts, Figure, Notes, Page, Section, Table
from fedalt.report.table import Table as Scores
from fedalt.runs.cells import Cost, CostLine, cost_in
from fedalt.runs.compare import folder_of
from fedalt.runs.folder import open_run
from fedalt.runs.record import StoreError
from fedalt.runs.settings import read_whole
from fedalt.runs.view import USUAL, Metric, View

RESULTS = "results.jsonl"


class _Metric(TypedDict):
    method: str
    seed: int
    client: str
    metric: str
    value: float


class _View(TypedDict):
    metric: Metric
    steps: Literal["equal", "rounds"]


class _Base(TypedDict):
    base: str
    client: str
    metrics: dict[str, float]


class _Notes(TypedDict):
    method: str
    notes: list[str]


class _Costs(CostLine):
    method: str
    seed: int


def read_results(path: Path) -> Results:
    """The results that `fedalt compare` wrote into a folder. Raises StoreError."""
    file = path / RESULTS
    read: list[dict[str, Any]] = read_lines(file, _Metric | _Costs | _View | _Base | _Notes)
    views = [View(**line) for line in read if "steps" in line and "method" not in line]
    notes = {line["method"]: line["notes"] for line in read if "notes" in line}
    lines = [line for line in read if "method" in line and "notes" not in line]
    base: dict[str, dict[str, dict[str, float]]] = {}
    for line in (line for line in read if "base" in line):
        base.setdefault(line["base"], {})[line["client"]] = line["metrics"]
    labels = list(dict.fromkeys(line["method"] for line in lines))
    seeds = list(dict.fromkeys(line["seed"] for line in lines))
    scores: dict[str, list[dict[str, dict[str, float]]]] = {
        label: [{} for _ in seeds] for label in labels
    }
    costs: dict[str, list[Cost]] = {label: [] for label in labels}
    for line in lines:
        label, at = line["method"], seeds.index(line["seed"])
        if "client" in line:
            scores[label][at].setdefault(line["client"], {})[line["metric"]] = line["value"]
        else:
            costs[label].append(cost_in(line))
    if not labels:
        raise StoreError(f"{file} is empty")
    for label, of in costs.items():
        if len(of) != len(seeds) or not all(scores[label]):
            raise StoreError(
                f"{file} is damaged: {label!r} has not the lines of costs and scores of each seed"
            )
    runs = {label: path / folder_of(label) / f"seed-{seeds[0]}" for label in labels}
    # A run whose cell was found in a file of results has no folder, only settings beside its place.
    files = {label: run / "settings.toml" for label, run in runs.items()}
    entries = [
        Compared(
            label,
            read_whole(own if own.exists() else runs[label].with_suffix(".toml")),
            notes.get(label),
        )
        for label, own in files.items()
    ]
    return Results(entries, seeds, scores, costs, views[0] if views else USUAL, base)


def comparison_page(path: Path) -> Page:
    """The page of a comparison's folder. Raises StoreError."""
    results = read_results(path)
    scores = results.tables()["scores"]
    baseline = next(iter(alone_in(results)), None)
    best = next(iter(figures.ranked(scores)))
    budget = list(budget_of(results))
    sections = [
        Section("compared", "What was compared", [Notes(budget[:-1]), _methods(results.entries)]),
        _scores(results, budget[-1], baseline),
        _costs(results.costs, scores),
        *_curves(path, results, best, baseline),
    ]
    seeds = len(results.seeds)
    return Page(
        title=path.resolve().name,
        over="Comparison of methods",
        lead=f"{len(results.entries)} methods under one budget, {seeds} seed{'s' * (seeds > 1)}.",
        key=[
            ("methods", str(len(results.entries))),
            ("clients", str(len(scores.clients))),
            ("seeds", str(seeds)),
            ("best mean", best),
        ],
        sections=sections,
        foot=str(path),
    )


def _scores(results: Results, reading: str, baseline: str | None) -> Section:
    scores = results.tables()["scores"]
    captions = {
        "scores": f"{heading(results.view.metric)} on test data",
        "losses": "Mean loss of an answer's token, in nats: lower is better",
    }
    gains = Figure(
        "gains",
        f"Gain over {baseline or 'the mean of all methods'}, by client",
        "Mean over seeds; above 0 is better.",
        figures.gain_map(scores, baseline),
        wide=True,
    )
    tables = [_grid_table(grid, captions[name]) for name, grid in grids_of(results).items()]
    parts = [*tables, Notes([reading], quiet=True), *_gap_table(results), gains]
    return Section("scores", "Scores", parts)


def _costs(costs: Mapping[str, Sequence[Cost]], scores: Scores) -> Section:
    megabytes = {
        method: fmean(cost.upload_bytes + cost.download_bytes for cost in seeds) / 1e6
        for method, seeds in costs.items()
    }
    seconds = {method: fmean(cost.seconds for cost in seeds) for method, seeds in costs.items()}
    order = "In the order of the mean score, which is the colour"
    drawn = [
        Figure(
            "bytes", "Bytes against quality", f"{order}: high and short is better.",
            figures.method_bars(scores, megabytes, "MB per client and round, both ways"),
        ),
        Figure(
            "seconds", "Seconds of training", f"{order}; they compare only if nothing else ran.",
            figures.method_bars(scores, seconds, "seconds of training"),
        ),
    ]  # fmt: skip
    return Section("costs", "What it costs", [*drawn, _cost_table(costs)])


def _methods(entries: Sequence[Compared]) -> Facts:
    """What each method is, and which of its own settings are not its usual ones."""
    items = []
    for entry in entries:
        usual, here = entry.method.settings, entry.settings["method"]
        other = [f"{name} = {here[name]}" for name in usual if here[name] != usual[name]]
        unlike = f" Here with {', '.join(other)}." if other else ""
        items.append((entry.label, f"{entry.method.title}{unlike}"))
    return Facts(items)


def _grid_table(grid: Grid, caption: str) -> Table:
    rows = [
        [
            Cell(method, method),
            *(
                Cell(shown_cell(grid, cell), fmean(cell.seeds) if cell.seeds else None, cell.bold)
                for cell in cells
            ),
            *(
                Cell(shown_gaps(gaps), gaps[0].mean if len(gaps) == 1 else None)
                for gaps in (to.get(method, ()) for to in grid.gaps.values())
            ),
        ]
        for method, cells in grid.rows.items()
    ]
    return Table(caption, ["method", *grid.columns, *grid.gaps], rows)


def _gap_table(results: Results) -> list[Table | Notes]:
    gaps = gaps_of(results)
    if not gaps:
        return []
    rows = [
        [Cell(text, text) for text in gap_cells(gap)[:3]]
        + [
            Cell(text, value)
            for text, value in zip(
                gap_cells(gap)[3:], (gap.clients, gap.mean, gap.low, gap.p, gap.holm), strict=True
            )
        ]
        for gap in gaps
    ]
    return [Table("Gaps between methods", list(GAP_HEADS), rows, wide=True), Notes([ABOUT_GAPS])]


def _cost_table(costs: Mapping[str, Sequence[Cost]]) -> Table:
    rows = [
        [Cell(method, method), *(Cell(text, _leading(text)) for text in cost_cells(seeds))]
        for method, seeds in costs.items()
    ]
    return Table("Costs, bytes per client and round", ["method", *HEADS], rows, wide=True)


def _leading(text: str) -> float:
    """The number that a cell such as 4–12 or 120 + 12 is sorted by: its first."""
    return float(re.split("[– ]", text)[0])


def _curves(path: Path, results: Results, best: str, baseline: str | None) -> list[Section]:
    """The section of learning curves; none where no run of the best method has a folder here."""
    lines = {
        entry.label: [
            line
            for seed in results.seeds
            if (run := path / folder_of(entry.label) / f"seed-{seed}").exists()
            for line in open_run(run).lines()
        ]
        for entry in results.entries
    }
    if not lines[best]:
        return []
    shown = baseline if baseline and lines[baseline] else None
    chart = figures.method_curves(figures.curve_rows(lines), best, shown)
    caption = "Mean over clients and seeds. Point at a line for its name."
    figure = Figure("training-loss", "Training loss", caption, chart, wide=True)
    return [Section("curves", "Learning curves", [figure])]
