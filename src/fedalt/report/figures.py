"""A run's charts, made of its record's rows: each function returns one Altair chart."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import altair as alt

from fedalt.report.records import MixerRecord, Rows
from fedalt.report.style import (
    ACCENT,
    INK,
    SECOND,
    data_of,
    faint,
    names_axis,
    rounds_axis,
    rows_high,
    styled,
)
from fedalt.report.table import Table

MOST_POINTS = 800  # to point at in one chart
_COLUMNS = ["own", "shared", "local"]
_COLOURS = [ACCENT, "#8a8f98", SECOND]


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
    layers = dict.fromkeys(row["layer"] for row in mixer.layers)
    rounds = dict.fromkeys(row["round"] for row in mixer.layers)
    cells = _weights(mixer.layers, mixer.slots[0]).encode(
        x=alt.X("round:O", title="round", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("layer:N", sort=list(layers), title="layer"),
        tooltip=["layer:N", "round:O", alt.Tooltip("weight:Q", format=".3f")],
    )
    return styled(_numbered(cells, mixer.layers, len(rounds)), rows_high(len(layers)))


def mixer_sites(mixer: MixerRecord) -> alt.LayerChart:
    """The first slot's weight by layer and kind of site after the last round, mean over clients."""
    layers = dict.fromkeys(row["layer"] for row in mixer.sites)
    kinds = list(dict.fromkeys(row["site"] for row in mixer.sites))
    cells = _weights(mixer.sites, mixer.slots[0]).encode(
        x=alt.X("site:N", sort=kinds, axis=names_axis(kinds)),
        y=alt.Y("layer:N", sort=list(layers), title="layer"),
        tooltip=["layer:N", "site:N", alt.Tooltip("weight:Q", format=".3f")],
    )
    return styled(_numbered(cells, mixer.sites, len(kinds)), rows_high(len(layers)))


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


def _curves(
    rows: Rows, field: str, title: str, *, zero: bool = False, numbers: str = "~g"
) -> alt.LayerChart:
    """Thin lines of clients, the one under the pointer in colour, and thick lines of means."""
    columns = [name for name in _COLUMNS if any(row["column"] == name for row in rows)]
    few = len({row["round"] for row in rows}) <= 2
    near = alt.selection_point(
        fields=["client"], on="pointerover", nearest=True, empty=False, clear="pointerout"
    )
    base = alt.Chart(data_of(rows)).encode(
        x=rounds_axis(),
        y=alt.Y(
            f"{field}:Q",
            title=title,
            scale=alt.Scale(zero=zero),
            axis=alt.Axis(format=numbers),
        ),
    )
    clients = len({row["client"] for row in rows})
    lit = alt.when(near).then(alt.value(0.9)).otherwise(alt.value(faint(clients)))
    own = base.transform_filter(alt.FieldEqualPredicate(field="column", equal=columns[0]))
    dot = {"size": 25, "filled": True, "color": INK} if few else False
    thin = own.mark_line(stroke=INK, strokeWidth=1, point=dot).encode(
        detail="client:N", opacity=lit
    )
    every = 1 + len(rows) // MOST_POINTS  # many points would make a page slow
    touch = (
        own.transform_filter(f"datum.round % {every} == 0")
        .mark_point(opacity=0, size=40)
        .encode(tooltip=["client:N", "round:Q", alt.Tooltip(f"{field}:Q", format=",.4~g")])
        .add_params(near)
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


def _weights(rows: Rows, slot: str) -> Any:
    """Cells coloured by a weight: one half is neutral."""
    spread = _spread(rows)
    scale = alt.Scale(scheme="blueorange", domain=[0.5 - spread, 0.5 + spread])
    legend = alt.Legend(title=f"weight of {slot}", format=".2f")
    cells = alt.Chart(data_of(rows)).mark_rect()
    return cells.encode(color=alt.Color("weight:Q", scale=scale, legend=legend))


def _numbered(cells: Any, rows: Rows, columns: int) -> Any:
    """The cells, each with its weight where there is room for it."""
    if columns > 8:
        return cells
    dark = alt.expr.abs(alt.datum.weight - 0.5) > 0.7 * _spread(rows)
    text = cells.mark_text(fontSize=10).encode(
        text=alt.Text("weight:Q", format=".2f"),
        color=alt.when(dark).then(alt.value("#fff")).otherwise(alt.value("#111")),
    )
    return alt.layer(cells, text)


def _spread(rows: Rows) -> float:
    """How far a weight is from one half at most."""
    return max((abs(row["weight"] - 0.5) for row in rows), default=0.0) or 0.5
