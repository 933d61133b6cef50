"""The table of a run or of several: a score per client and column, mean, worst, and gain."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich.filesize import decimal
from rich.text import Text

from fedalt.report.headline import LABELS, metrics_of, values_of
from fedalt.report.headline import Scored as Scored
from fedalt.report.headline import Values as Values
from fedalt.report.sheet import Sheet, csv_text, markdown, markdown_cell
from fedalt.runs.view import Metric

Line = Mapping[str, Any]
Fold = Callable[[Iterable[float]], float]

COLUMNS = ("own", "shared", "local", "base")
BASELINE = "local"


@dataclass(frozen=True)
class Row:
    """A line of the table: scores in the order of its columns, () where absent.

    `gain` is how much better the first column is than the baseline.
    """

    name: str
    metric: str
    scores: tuple[Values, ...]
    gain: Values


@dataclass(frozen=True)
class Table:
    """Rows of clients, their mean and their worst, column by column.

    Scores run from 0 to 100: accuracy where a client's records list options or labels, ROUGE-L
    elsewhere. A table of losses is in nats, and lower is better.
    """

    columns: tuple[str, ...]
    baseline: str | None
    clients: tuple[Row, ...]
    mean: Row
    worst: Row

    @property
    def seeds(self) -> int:
        """How many numbers every cell stands for."""
        return max(len(values) for values in self.mean.scores)

    @property
    def of_losses(self) -> bool:
        """Whether lower is better."""
        return self.mean.metric == "loss"


def run_table(lines: Iterable[Line], split: str = "test", *, losses: bool = False) -> Table:
    """The table of one run's lines, of its scores or of its losses.

    Raises ValueError where nothing was scored.
    """
    lines = list(lines)
    scored = {column: [scores_of(lines, column, split)] for column in COLUMNS}
    seen = {column: seeds for column, seeds in scored.items() if seeds[0]}
    return joined(seen, BASELINE, metric="loss" if losses else "score")


def scores_of(lines: Iterable[Line], column: str, split: str = "test") -> Scored:
    """Metrics by client as a run's lines tell them last.

    Once rounds have followed, a client counts only if it was scored again: it may have left.
    """
    scored: dict[str, Mapping[str, float]] = {}
    is_over = False
    for line in lines:
        if line["kind"] == "round":
            is_over = True
        elif (line["kind"], line.get("split"), line.get("column")) == ("score", split, column):
            if is_over:
                scored, is_over = {}, False
            scored[line["client"]] = line["metrics"]
    return scored


def joined(
    columns: Mapping[str, Sequence[Scored]],
    baseline: str | None = None,
    *,
    metric: Metric = "score",
) -> Table:
    """A table whose columns come from different runs, each with the scores of one or more seeds.

    The gain is that of the first column over the baseline, if that is a column at all. Where a
    client has neither accuracy nor generated texts, a table of scores is one of losses; of another
    metric only those clients are in the table that have it. ValueError where nobody has.
    """
    clients = sorted({client for seeds in columns.values() for seed in seeds for client in seed})
    if not clients:
        raise ValueError("nothing has been scored: no client has data to score on")
    names = tuple(columns)
    metrics = metrics_of(clients, columns, metric)
    gain_over = names.index(baseline) if baseline in names[1:] else None
    rows = []
    for client, own in metrics.items():
        scores = tuple(values_of(columns[name], client, own) for name in names)
        gain = () if gain_over is None else _gain(scores[0], scores[gain_over], own)
        rows.append(Row(client, LABELS[own], scores, gain))
    worst = max if "loss" in metrics.values() else min
    return Table(
        columns=names,
        baseline=None if gain_over is None else baseline,
        clients=tuple(rows),
        mean=_over_clients("mean", rows, fmean, fmean),
        worst=_over_clients("worst client", rows, worst, min),
    )


def draw(table: Table, title: str = "") -> Sheet:
    """The table for a terminal; the best column of every row is bold."""
    rows: list[list[str | Text]] = []
    for row in (*table.clients, table.mean, table.worst):
        best = best_of(table, row)
        cells = [
            Text(cell, style="bold" if at in best else "")
            for at, cell in enumerate(cells_of(table, row))
        ]
        rows.append([row.name, row.metric, *cells])
    heads = ["client", "score", *heads_of(table)]
    return Sheet(heads, rows, title, left=(0, 1), breaks=(len(table.clients),))


def to_markdown(table: Table) -> str:
    """The table as Markdown."""
    rows = (
        [markdown_cell(row.name), row.metric, *cells_of(table, row)]
        for row in (*table.clients, table.mean, table.worst)
    )
    return markdown(["client", "score", *map(markdown_cell, heads_of(table))], rows, left=(0, 1))


def to_csv(table: Table, seeds: Sequence[int]) -> str:
    """One number per line, so that nothing is rounded or averaged away."""
    rows = (
        (row.name, column, row.metric, seed, value)
        for row in table.clients
        for column, values in zip(table.columns, row.scores, strict=True)
        for seed, value in zip(seeds, values, strict=False)  # a client may have none
    )
    return csv_text(("client", "column", "metric", "seed", "value"), rows)


def to_json(table: Table) -> dict[str, Any]:
    """The table as an object for `json.dumps`: numbers, or lists of them where seeds are many."""

    def shown(row: Row) -> dict[str, Any]:
        return {
            "metric": row.metric,
            "scores": dict(zip(table.columns, map(_number, row.scores), strict=True)),
            "gain": _number(row.gain),
        }

    return {
        "columns": list(table.columns),
        "clients": {row.name: shown(row) for row in table.clients},
        "mean": shown(table.mean),
        "worst": shown(table.worst),
    }


def describe(lines: Iterable[Line], split: str = "test") -> list[str]:
    """Sentences under a run's table: which rounds were scored, and what a round sends."""
    lines = list(lines)
    rounds = {
        line["column"]: line["round"]
        for line in lines
        if line["kind"] == "score" and line["split"] == split
    }
    after = ", ".join(
        f"{column} after round {round_ + 1}" if round_ >= 0 else f"{column} without any training"
        for column, round_ in rounds.items()
    )
    sentences = [f"scored on {split} data: {after}"]
    sent = [line for line in lines if line["kind"] == "train" and line["column"] == "own"]
    if sent:
        up, down = (fmean(line[f"{way}_bytes"] for line in sent) for way in ("upload", "download"))
        sentences.append(
            f"a client uploads {decimal(round(up))} and downloads {decimal(round(down))} per round "
            "(mean)"
        )
    return sentences + spent_privacy(lines)


def spent_privacy(lines: Iterable[Line]) -> list[str]:
    """A sentence on the privacy that a run's rounds have spent, if they keep count of it."""
    counted = [line for line in lines if line["kind"] == "round" and "delta" in line]
    if not counted:
        return []
    last = counted[-1]
    rounds, delta = f"{len(counted)} rounds", last["delta"]
    if last["epsilon"] is None:
        return [f"privacy: without noise {rounds} promise nothing (epsilon is infinite)"]
    return [f"privacy: epsilon {last['epsilon']:.3g} at delta {delta:g} spent in {rounds}"]


def verdict(table: Table, ours: str, other: str) -> str:
    """Whether the mean of one column beats another's by more than both spreads over the seeds.

    Above 0 is better for `ours`, in a table of losses too. A spread is a standard deviation.
    """
    first, second = (table.mean.scores[table.columns.index(name)] for name in (ours, other))
    better = -1 if table.of_losses else 1
    gap = better * (fmean(first) - fmean(second))
    sentence = f"{ours} {shown_values(first)}, {other} {shown_values(second)}: "
    if len(first) < 2:
        return f"{sentence}a difference of {gap:+.1f}; one seed tells nothing about the spread"
    spread = stdev(first) + stdev(second)
    if gap > spread:
        return f"{sentence}{ours} is ahead by {gap:.1f}, beyond the spread of the seeds"
    if gap < -spread:
        return f"{sentence}{ours} is behind by {-gap:.1f}, beyond the spread of the seeds"
    return f"{sentence}a difference of {gap:+.1f}, within the spread of the seeds"


def _gain(own: Values, baseline: Values, metric: str) -> Values:
    if len(own) != len(baseline):
        return ()
    sign = -1 if metric == "loss" else 1
    return tuple(sign * (a - b) for a, b in zip(own, baseline, strict=True))


def _over_clients(name: str, rows: Sequence[Row], score: Fold, gain: Fold) -> Row:
    """A row of one number per seed, made of the clients' numbers of that seed."""

    def folded(cells: Sequence[Values], fold: Fold) -> Values:
        return tuple(fold(seed) for seed in zip(*cells, strict=True)) if all(cells) else ()

    columns = range(len(rows[0].scores))
    metrics = {row.metric for row in rows}
    scores = tuple(folded([row.scores[at] for row in rows], score) for at in columns)
    metric = metrics.pop() if len(metrics) == 1 else ""
    return Row(name, metric, scores, folded([row.gain for row in rows], gain))


def heads_of(table: Table) -> list[str]:
    """What stands over the numbers of a row."""
    return [*table.columns, *([f"gain over {table.baseline}"] if table.baseline else [])]


def cells_of(table: Table, row: Row) -> list[str]:
    """A row's numbers as they are shown."""
    digits = 3 if table.of_losses else 1
    gain = [shown_values(row.gain, digits, sign="+")] if table.baseline else []
    return [*(shown_values(values, digits) for values in row.scores), *gain]


def best_of(table: Table, row: Row) -> set[int]:
    """Where the best scores of a row are; nothing is best of one."""
    means = {at: fmean(values) for at, values in enumerate(row.scores) if values}
    if len(means) < 2:
        return set()
    best = min(means.values()) if table.of_losses else max(means.values())
    return {at for at, value in means.items() if value == best}


def shown_values(values: Values, digits: int = 1, sign: str = "") -> str:
    """Mean and spread over the seeds."""
    if not values:
        return "–"
    mean = f"{fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def _number(values: Values) -> float | list[float] | None:
    if not values:
        return None
    return values[0] if len(values) == 1 else list(values)
