"""A run's charts, made of its record's rows: each function returns one Altair chart."""

import json
from collections.abc import Sequence
from statistics import fmean

import altair as alt

from fedalt.report.records import MixerRecord, Rows
from fedalt.report.similarity import Similarity
from fedalt.report.style import (
    ACCENT,
    INK,
    SECOND,
    data_of,
    faint,
    heat_map,
    lines_of,
    names_axis,
    rounds_axis,
    rows_high,
    styled,
)
from fedalt.report.table import Table

MOST_POINTS = 800  # to point at in one chart
_COLUMNS = ["own", "shared", "local", "base"]
_COLOURS = [ACCENT, "#8a8f98", SECOND, "#5b8c3e"]


def score_dots(table: Table) -> alt.LayerChart:
    """A client's scores in every column of its table, on one line."""
    rows = [
        {"client": row.name, "column": column, "score": fmean(values), "metric": row.metric}
        for row in table.clients
        for column, values in zip(table.columns, row.scores, strict=True)
        if values
    ]
    base = alt.Chart(data_of(rows)).encode(
        y=alt.Y("client:N", title=None, sort=None, axis=alt.Axis(grid=True)),
        x=alt.X("score:Q", title=table.mean.metric or "score", scale=alt.Scale(zero=False)),
    )
    span = base.mark_rule(stroke=INK, opacity=0.25, strokeWidth=2).encode(
        x="min(score):Q", x2="max(score):Q"
    )
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        color=_by_column(table.columns),
        shape=alt.Shape(
            "column:N", scale=alt.Scale(domain=list(table.columns)), legend=alt.Legend(title=None)
        ),
        tooltip=["client:N", "column:N", "metric:N", alt.Tooltip("score:Q", format=".4~g")],
    )
    return styled(alt.layer(span, dots), rows_high(len(table.clients)))


def learning_curves(rows: Rows, what: str) -> alt.LayerChart:
    """Losses over the rounds: thin lines of clients, thick ones of their mean in each column."""
    return _curves(rows, "loss", what)


def mixer_curves(mixer: MixerRecord) -> alt.LayerChart:
    """The first slot's mean weight over the rounds, for every client and in the mean."""
    rows = [{**row, "column": "own"} for row in mixer.clients]
    return _curves(rows, "weight", f"weight of {mixer.slots[0]}")


def mixer_layers(mixer: MixerRecord) -> alt.LayerChart:
    """The first slot's weight by layer and round, mean over clients and the layer's sites."""
    rounds = alt.X("round:O", title="round", axis=alt.Axis(labelAngle=0))
    return _weights(mixer.layers, mixer.slots[0], rounds)


def mixer_sites(mixer: MixerRecord) -> alt.LayerChart:
    """The first slot's weight by layer and kind of site after the last round, mean over clients."""
    kinds = list(dict.fromkeys(row["site"] for row in mixer.sites))
    sites = alt.X("site:N", sort=kinds, axis=names_axis(kinds))
    return _weights(mixer.sites, mixer.slots[0], sites)


def mixer_tokens(mixer: MixerRecord) -> alt.LayerChart:
    """How the first slot's weight spreads over tokens and sites: all clients, and each."""
    title = f"weight of {mixer.slots[0]}"
    base = alt.Chart(data_of(mixer.tokens)).encode(
        x=alt.X("weight:Q", title=title, scale=alt.Scale(domain=[0, 1]))
    )
    clients = len({row["client"] for row in mixer.tokens})
    half = 0.5 / len({row["weight"] for row in mixer.tokens})
    mean = (
        base.transform_aggregate(share="mean(share)", groupby=["weight"])
        .transform_calculate(low=f"datum.weight - {half}", high=f"datum.weight + {half}")
        .mark_rect(color=ACCENT, opacity=0.85)
        .encode(
            x=alt.X("low:Q", title=title, scale=alt.Scale(domain=[0, 1])),
            x2="high:Q",
            y=alt.Y("share:Q", title="share of tokens", axis=alt.Axis(format="%")),
            y2=alt.Y2(datum=0),
            tooltip=[
                alt.Tooltip("weight:Q", format=".3f"),
                alt.Tooltip("share:Q", title="share, all clients", format=".1%"),
            ],
        )
    )
    each = base.mark_line(
        stroke=INK, strokeWidth=1, opacity=faint(clients), interpolate="step"
    ).encode(y="share:Q", detail="client:N", tooltip=["client:N"])
    return styled(alt.layer(mean, each))


def client_costs(rows: Rows, field: str, title: str) -> alt.LayerChart:
    """What every client's training took in a round, and the mean."""
    return _curves(rows, field, title, zero=True, numbers="~s" if field != "seconds" else "~g")


def round_curve(rows: Rows, field: str, title: str) -> alt.LayerChart:
    """One number of each round."""
    line = (
        alt.Chart(data_of(rows))
        .mark_line(color=ACCENT, strokeWidth=2.5, point={"size": 30, "filled": True})
        .encode(
            x=rounds_axis(),
            y=alt.Y(f"{field}:Q", title=title),
            tooltip=["round:Q", alt.Tooltip(f"{field}:Q", title=title, format=",.4~g")],
        )
    )
    return styled(line, 200)


def similarity_map(similar: Similarity) -> alt.LayerChart:
    """Cosines of all pairs of clients' adapters, in the order of the tree beside it."""
    names = similar.names
    rows: Rows = [
        {"client": client, "other": other, "cosine": similar.cosines[i][j]}
        for i, client in enumerate(names)
        for j, other in enumerate(names)
    ]
    apart = [row["cosine"] for row in rows if row["client"] != row["other"]]
    axes = (
        alt.X("other:N", sort=names, axis=names_axis(names)),
        alt.Y("client:N", sort=names, title=None),
    )
    return heat_map(
        rows,
        axes,
        alt.Tooltip("cosine:Q", title="cosine", format=".2f"),
        alt.Scale(scheme="viridis", domain=[min(apart), max(apart)], clamp=True),
        white=f"datum.cosine <= {(min(apart) + 2 * max(apart)) / 3}",
    )


def similarity_tree(similar: Similarity) -> alt.LayerChart:
    """Average linkage of 1 - cosine: where two branches meet is how far apart they are."""
    names = list(similar.names)
    axis = alt.Axis(
        values=list(range(len(names))),
        tickCount=len(names),
        labelExpr=f"{json.dumps(names)}[datum.value]",
        grid=False,
        title=None,
    )
    scale = alt.Scale(domain=[len(names) - 0.5, -0.5], nice=False, zero=False)
    line = (
        alt.Chart(data_of(similar.branches))
        .mark_line(stroke=ACCENT, strokeWidth=1.5, interpolate="linear")
        .encode(
            x=alt.X("distance:Q", title="1 − cosine", scale=alt.Scale(reverse=True)),
            y=alt.Y("place:Q", axis=axis, scale=scale),
            detail="branch:N",
            order="step:Q",
            tooltip=[alt.Tooltip("height:Q", title="1 − cosine", format=".3f")],
        )
    )
    return styled(line, rows_high(len(names)))


def _curves(
    rows: Rows, field: str, title: str, *, zero: bool = False, numbers: str = "~g"
) -> alt.LayerChart:
    """Thin lines of clients, the one under the pointer in colour, and thick lines of means."""
    columns = [name for name in _COLUMNS if any(row["column"] == name for row in rows)]
    few = len({row["round"] for row in rows}) <= 2
    scale, axis = alt.Scale(zero=zero), alt.Axis(format=numbers)
    base = alt.Chart(data_of(rows)).encode(
        x=rounds_axis(), y=alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)
    )
    thin, touch = lines_of(
        base.transform_filter(alt.FieldEqualPredicate(field="column", equal=columns[0])),
        "client",
        field,
        faint(len({row["client"] for row in rows})),
        dots=few,
        every=1 + len(rows) // MOST_POINTS,  # many points would make a page slow
    )
    means = base.mark_line(strokeWidth=3, point={"size": 50, "filled": True} if few else False)
    thick = means.encode(
        y=alt.Y(f"mean({field}):Q", title=title),
        color=_by_column(columns, shown=len(columns) > 1),
    )
    return styled(alt.layer(thin, thick, touch))


def _by_column(columns: Sequence[str], *, shown: bool = True) -> alt.Color:
    colours = [_COLOURS[_COLUMNS.index(name)] for name in columns]
    scale = alt.Scale(domain=list(columns), range=colours)
    return alt.Color("column:N", scale=scale, legend=alt.Legend(title=None) if shown else None)


def _weights(rows: Rows, slot: str, across: alt.X) -> alt.LayerChart:
    """Cells by layer, coloured by a slot's weight: one half is neutral."""
    spread = max((abs(row["weight"] - 0.5) for row in rows), default=0.0) or 0.5
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    return heat_map(
        rows,
        (across, alt.Y("layer:N", sort=layers, title="layer")),
        alt.Tooltip("weight:Q", title="weight", format=".2f"),
        alt.Scale(scheme="blueorange", domain=[0.5 - spread, 0.5 + spread]),
        white=f"abs(datum.weight - 0.5) > {0.7 * spread}",
        legend=f"weight of {slot}",
    )
