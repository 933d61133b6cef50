"""Charts of how alike clients' adapters are."""

import altair as alt

from fedalt.report.records import Rows
from fedalt.report.similarity import Similarity
from fedalt.report.style import ACCENT, data_of, literal, names_axis, rows_high, styled


def similarity_map(similar: Similarity) -> alt.LayerChart:
    """Cosines of all pairs of clients' adapters, in the order of the tree beside it."""
    names = similar.names
    rows: Rows = [
        {"client": one, "other": other, "cosine": similar.cosines[i][j]}
        for i, one in enumerate(names)
        for j, other in enumerate(names)
    ]
    apart = [row["cosine"] for row in rows if row["client"] != row["other"]]
    scale = alt.Scale(scheme="viridis", domain=[min(apart), max(apart)], clamp=True)
    base = alt.Chart(data_of(rows)).encode(
        x=alt.X("other:N", sort=names, axis=names_axis(names)),
        y=alt.Y("client:N", sort=names, title=None),
    )
    cells = base.mark_rect().encode(
        color=alt.Color("cosine:Q", scale=scale, legend=alt.Legend(title="cosine", format=".2f")),
        tooltip=["client:N", "other:N", alt.Tooltip("cosine:Q", format=".3f")],
    )
    if len(names) > 8:
        return styled(cells, rows_high(len(names)))
    bright = (min(apart) + 2 * max(apart)) / 3
    text = base.mark_text(fontSize=10).encode(
        text=alt.Text("cosine:Q", format=".2f"),
        color=alt.when(alt.datum.cosine > bright)
        .then(alt.value("#111"))
        .otherwise(alt.value("#fff")),
    )
    return styled(alt.layer(cells, text), rows_high(len(names)))


def similarity_tree(similar: Similarity) -> alt.LayerChart:
    """Average linkage of 1 - cosine: where two branches meet is how far apart they are."""
    axis = alt.Axis(
        values=list(range(len(similar.names))),
        tickCount=len(similar.names),
        labelExpr=f"{literal(list(similar.names))}[datum.value]",
        grid=False,
        title=None,
    )
    room = [len(similar.names) - 0.5, -0.5]
    scale = alt.Scale(domain=room, nice=False, zero=False)
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
    return styled(line, rows_high(len(similar.names)))
