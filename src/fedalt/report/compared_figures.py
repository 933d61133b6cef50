"""A comparison's charts: methods by clients, what each takes, and loss curves."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import altair as alt

from fedalt.report.comparison import grid_of
from fedalt.report.records import Rows, short
from fedalt.report.style import (
    ACCENT,
    SECOND,
    data_of,
    heat_map,
    lines_of,
    names_axis,
    rounds_axis,
    rows_high,
    styled,
)
from fedalt.report.table import Table


def gain_map(table: Table, baseline: str | None) -> alt.LayerChart:
    """How much better each method is than the baseline, client by client, mean over seeds.

    Without a baseline: better than the mean of all methods.
    """
    sign = -1 if table.of_losses else 1
    rows: Rows = []
    for client, means in _columns(table).items():
        zero = means.get(baseline) if baseline else fmean(means.values())
        rows += [
            {"method": method, "client": client, "gain": short(sign * (mean - zero))}
            for method, mean in means.items()
            if zero is not None
        ]
    clients = list(dict.fromkeys(row["client"] for row in rows))
    most = max(abs(row["gain"]) for row in rows) or 1.0
    title = f"gain over {baseline or 'the mean of all'}"
    axes = (
        alt.X("client:N", sort=clients, axis=names_axis(clients)),
        alt.Y("method:N", sort=list(ranked(table)), title=None),
    )
    return heat_map(
        rows,
        axes,
        alt.Tooltip("gain:Q", title=title, format="+.2f" if table.of_losses else "+.1f"),
        alt.Scale(scheme="blueorange", domain=[-most, most], reverse=True),
        white=f"abs(datum.gain) > {0.6 * most}",
    )


def method_bars(table: Table, values: Mapping[str, float], title: str) -> alt.LayerChart:
    """What each method takes, in the order of the mean scores, which colour the bars."""
    rows: Rows = [
        {"method": method, "value": short(values[method]), "score": short(score)}
        for method, score in ranked(table).items()
    ]
    score = f"mean {table.mean.metric or 'score'}"
    scale = alt.Scale(scheme="viridis", reverse=table.of_losses)
    bars = (
        alt.Chart(data_of(rows))
        .mark_bar(height=alt.RelativeBandSize(0.6), cornerRadiusEnd=2)
        .encode(
            x=alt.X("value:Q", title=title),
            y=alt.Y("method:N", sort=[row["method"] for row in rows], title=None),
            color=alt.Color("score:Q", scale=scale, legend=alt.Legend(title=score)),
            tooltip=[
                "method:N",
                alt.Tooltip("value:Q", title=title, format=",.4~g"),
                alt.Tooltip("score:Q", title=score, format=".4~g"),
            ],
        )
    )
    return styled(bars, rows_high(len(rows)))


def method_curves(rows: Rows, best: str, baseline: str | None) -> alt.LayerChart:
    """Loss over the rounds, a line for each method: the best one and the baseline in colour."""
    named = [best, *([baseline] if baseline and baseline != best else [])]
    base = alt.Chart(data_of(rows)).encode(
        x=rounds_axis(), y=alt.Y("loss:Q", title="training loss", scale=alt.Scale(zero=False))
    )
    thin, touch = lines_of(base, "method", "loss", 0.25)
    colours = alt.Scale(domain=named, range=[ACCENT, SECOND][: len(named)])
    thick = (
        base.transform_filter(alt.FieldOneOfPredicate("method", named))
        .mark_line(strokeWidth=3)
        .encode(color=alt.Color("method:N", scale=colours, legend=alt.Legend(title=None)))
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
    """Mean scores by method, the best first, each over the clients that the method had, if any."""
    rows = grid_of(table).rows.items()
    means = {method: fmean(cells[-2].seeds) for method, cells in rows if cells[-2].seeds}
    sign = 1 if table.of_losses else -1
    return dict(sorted(means.items(), key=lambda item: sign * item[1]))


def curve_rows(curves: Mapping[str, Iterable[Mapping[str, Any]]]) -> Rows:
    """Mean training losses by method and round, over clients and seeds, from lines by method."""
    rows: Rows = []
    for method, lines in curves.items():
        losses: dict[int, list[float]] = {}
        for line in lines:
            if line["kind"] == "train" and line["column"] == "own":
                losses.setdefault(line["round"] + 1, []).append(line["metrics"]["loss"])
        rows += [
            {"method": method, "round": at, "loss": short(fmean(values))}
            for at, values in sorted(losses.items())
        ]
    return rows
