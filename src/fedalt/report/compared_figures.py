"""A comparison's charts: methods by clients, quality against bytes, seconds, and loss curves."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from fedalt.report.comparison import grid_of
from fedalt.report.labels import HEIGHT, SIDES, Point, sides
from fedalt.report.records import Rows, short
from fedalt.report.style import (
    ACCENT,
    INK,
    SECOND,
    data_of,
    names_axis,
    rounds_axis,
    rows_high,
    styled,
)
from fedalt.report.table import Table
from fedalt.runs.compare import Cost


def gain_map(table: Table, yardstick: str | None) -> alt.LayerChart:
    """How much better each method is than the yardstick, client by client, mean over seeds.

    Without a yardstick: better than the mean of all methods.
    """
    sign = -1 if table.of_losses else 1
    rows: Rows = []
    for client, means in _columns(table).items():
        zero = means.get(yardstick) if yardstick else fmean(means.values())
        rows += [
            {"method": method, "client": client, "gain": short(sign * (mean - zero))}
            for method, mean in means.items()
            if zero is not None
        ]
    clients = list(dict.fromkeys(row["client"] for row in rows))
    most = max(abs(row["gain"]) for row in rows) or 1.0
    scale = alt.Scale(scheme="blueorange", domain=[-most, most], reverse=True)
    digits = 3 if table.of_losses else 1
    base = alt.Chart(data_of(rows)).encode(
        x=alt.X("client:N", sort=clients, axis=names_axis(clients)),
        y=alt.Y("method:N", sort=list(ranked(table)), title=None),
    )
    title = f"gain over {yardstick or 'the mean of all'}"
    cells = base.mark_rect().encode(
        color=alt.Color("gain:Q", scale=scale, legend=alt.Legend(title=title)),
        tooltip=["method:N", "client:N", alt.Tooltip("gain:Q", title=title, format=f"+.{digits}f")],
    )
    if len(clients) > 10:
        return styled(cells, rows_high(len(table.columns)))
    text = base.mark_text(fontSize=9.5).encode(
        text=alt.Text("gain:Q", format=f"+.{min(digits, 2) - (digits == 1)}f"),
        color=alt.when(f"abs(datum.gain) > {0.6 * most}")
        .then(alt.value("#fff"))
        .otherwise(alt.value("#111")),
    )
    return styled(alt.layer(cells, text), rows_high(len(table.columns)))


def bytes_against_quality(table: Table, costs: Mapping[str, Sequence[Cost]]) -> alt.LayerChart:
    """Bytes a client sends and receives in a round against the mean score; named where it fits."""
    points = [
        Point(
            method,
            fmean(cost.upload_bytes + cost.download_bytes for cost in costs[method]) / 1e6,
            score,
        )
        for method, score in ranked(table).items()
    ]
    rows = [
        {
            "method": point.name,
            "megabytes": short(point.x),
            "score": short(point.y),
            "side": -1 if side is None else SIDES.index(side),
        }
        for point, side in zip(points, sides(points), strict=True)
    ]
    title = table.mean.metric or "score"
    base = alt.Chart(data_of(rows)).encode(
        x=alt.X("megabytes:Q", title="MB per client and round, both ways"),
        y=alt.Y("score:Q", title=f"mean {title}", scale=alt.Scale(zero=False)),
    )
    dots = base.mark_circle(size=70, color=ACCENT, opacity=0.9).encode(
        tooltip=[
            "method:N",
            alt.Tooltip("megabytes:Q", title="MB", format=",.3~f"),
            alt.Tooltip("score:Q", title=title, format=".4~g"),
        ]
    )
    names = [
        base.transform_filter(alt.datum.side == number)
        .mark_text(fill=INK, fontSize=11, align=side.align, dx=side.dx, dy=side.dy)
        .encode(text="method:N")
        for number, side in enumerate(SIDES)
        if any(row["side"] == number for row in rows)
    ]
    return styled(alt.layer(dots, *names), HEIGHT)


def method_seconds(table: Table, costs: Mapping[str, Sequence[Cost]]) -> alt.LayerChart:
    """Seconds of training, mean over the seeds."""
    rows: Rows = [
        {"method": method, "seconds": short(fmean(cost.seconds for cost in costs[method]))}
        for method in ranked(table)
    ]
    bars = (
        alt.Chart(data_of(rows))
        .mark_bar(color=ACCENT, height=alt.RelativeBandSize(0.6), cornerRadiusEnd=2)
        .encode(
            x=alt.X("seconds:Q", title="seconds of training"),
            y=alt.Y("method:N", sort=[row["method"] for row in rows], title=None),
            tooltip=["method:N", alt.Tooltip("seconds:Q", format=",.4~g")],
        )
    )
    return styled(bars, rows_high(len(rows)))


def method_curves(rows: Rows, best: str, yardstick: str | None) -> alt.LayerChart:
    """Loss over the rounds, a line for each method: the best one and the yardstick in colour."""
    near = alt.selection_point(
        fields=["method"], on="pointerover", nearest=True, empty=False, clear="pointerout"
    )
    named = [best, *([yardstick] if yardstick and yardstick != best else [])]
    base = alt.Chart(data_of(rows)).encode(
        x=rounds_axis(), y=alt.Y("loss:Q", title="training loss", scale=alt.Scale(zero=False))
    )
    lit = alt.when(near).then(alt.value(0.9)).otherwise(alt.value(0.25))
    thin = base.mark_line(stroke=INK, strokeWidth=1.2).encode(detail="method:N", opacity=lit)
    colours = alt.Scale(domain=named, range=[ACCENT, SECOND][: len(named)])
    thick = (
        base.transform_filter(alt.FieldOneOfPredicate("method", named))
        .mark_line(strokeWidth=3)
        .encode(color=alt.Color("method:N", scale=colours, legend=alt.Legend(title=None)))
    )
    touch = (
        base.mark_point(opacity=0, size=40)
        .encode(tooltip=["method:N", "round:Q", alt.Tooltip("loss:Q", format=".4~g")])
        .add_params(near)
    )
    return styled(alt.layer(thin, thick, touch))


def _columns(table: Table) -> dict[str, dict[str, float]]:
    """Mean scores by column of the heat map and method; tasks where clients are many, as printed.

    Clients whose names tell no tasks are columns of their own, however many they are.
    """
    grid = grid_of(table)
    tasks = grid.columns[:-2]
    if len(tasks) > 1:
        return {
            task: {
                method: fmean(cells[at].seeds)
                for method, cells in grid.rows.items()
                if cells[at].seeds
            }
            for at, task in enumerate(tasks)
        }
    return {
        row.name: {
            method: fmean(values)
            for method, values in zip(table.columns, row.scores, strict=True)
            if values
        }
        for row in table.clients
    }


def ranked(table: Table) -> dict[str, float]:
    """Mean scores by method, the best first, each over the clients that the method had."""
    means = {method: fmean(cells[-2].seeds) for method, cells in grid_of(table).rows.items()}
    sign = 1 if table.of_losses else -1
    return dict(sorted(means.items(), key=lambda item: sign * item[1]))


def curve_rows(curves: Mapping[str, Iterable[Mapping[str, Any]]]) -> Rows:
    """Mean training losses by method and round, over clients and seeds, from lines by method."""
    rows: Rows = []
    for method, lines in curves.items():
        losses: dict[int, list[float]] = {}
        for line in lines:
            if line["kind"] == "train" and line["column"] == "own":
                losses.setdefault(line["round"], []).append(line["metrics"]["loss"])
        rows += [
            {"method": method, "round": at, "loss": short(fmean(each))}
            for at, each in sorted(losses.items())
        ]
    return rows
