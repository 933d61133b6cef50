"""How every chart of a report looks: one accent, quiet axes, ink that follows the page's colour."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from fedalt.core.foreign import shown

ACCENT, SECOND = "#3a7fc1", "#d9822b"  # told apart by colour-blind readers too
INK = "currentColor"  # dark on a light page, light on a dark one, black on paper
MOST_NUMBERED = 8  # columns of a heat map whose cells have room for numbers
WIDTH = 560  # of a figure on its own; on a page it is as wide as there is room
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"

_QUIET = {"labelColor": INK, "titleColor": INK, "labelFontSize": 11, "titleFontSize": 11}
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        **_QUIET,
        "titleFontWeight": "normal",
        "labelOpacity": 0.8,
        "titleOpacity": 0.8,
        "titlePadding": 8,
        "labelLimit": 110,
        "domain": False,
        "ticks": False,
        "labelPadding": 8,
        "gridColor": INK,
        "gridOpacity": 0.1,
        "labelOverlap": "parity",
    },
    "axisBand": {"grid": False},
    "axisQuantitative": {"tickCount": 6},
    "legend": {
        **_QUIET,
        "titleFontWeight": "normal",
        "labelOpacity": 0.8,
        "titleOpacity": 0.8,
        "orient": "top",
        "gradientLength": 150,
        "gradientThickness": 8,
        "symbolStrokeWidth": 2.5,
        "labelLimit": 150,
    },
    "line": {"strokeCap": "round", "strokeJoin": "round"},
}


def data_of(rows: Sequence[Mapping[str, Any]]) -> alt.Data:
    """A chart's data: as one text, which Altair does not check row by row."""
    form = alt.JsonDataFormat(type="json")
    clean = [
        {key: shown(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in rows
    ]
    return alt.Data(values=json.dumps(clean), format=form)  # type: ignore[no-untyped-call]


def styled(chart: Any, height: int = 240) -> alt.LayerChart:
    """The chart in the look of all of them; a layered one, whatever it was."""
    layered: Any = chart if isinstance(chart, alt.LayerChart) else alt.layer(chart)
    whole: alt.LayerChart = layered.properties(width=WIDTH, height=height).configure(**_CONFIG)
    return whole


def rows_high(count: int) -> int:
    """The height of a heat map or of bars with so many rows."""
    return count * (26 if count <= 16 else 16 if count <= 32 else 14)


def faint(lines: int) -> float:
    """The opacity of thin lines: the more there are, the less each."""
    return max(0.06, min(0.25, 3 / lines))


def rounds_axis() -> alt.X:
    """An axis of whole numbers."""
    axis = alt.Axis(tickMinStep=1, format="d", grid=False)
    return alt.X("round:Q", title="round", axis=axis, scale=alt.Scale(nice=False))


def names_axis(names: Sequence[str]) -> alt.Axis:
    """Names below columns: upright where the room is too narrow for them."""
    longest = max((len(name) for name in names), default=1)
    fits = f"bandwidth('x') > {min(longest * 6.4, 110) + 6:.0f}"
    return alt.Axis(
        orient="top",
        title=None,
        labelAngle=alt.ExprRef(f"{fits} ? 0 : -90"),
        labelAlign=alt.ExprRef(f"{fits} ? 'center' : 'left'"),
        labelBaseline=alt.ExprRef(f"{fits} ? 'bottom' : 'middle'"),
    )


def heat_map(
    rows: Sequence[Mapping[str, Any]],
    axes: tuple[alt.X, alt.Y],
    value: alt.Tooltip,
    scale: alt.Scale,
    *,
    white: str = "",
    legend: str = "",
    also: Sequence[alt.Tooltip] = (),
) -> alt.LayerChart:
    """Cells coloured by a value; `white` tells, of a datum, where a number on it has to be white.

    The numbers stand there unless they would have no room, or without `white`.
    """
    field, title = value["shorthand"], value["title"]
    columns, lines = (len({row[axis["shorthand"][:-2]] for row in rows}) for axis in axes)
    across, down = (axis["shorthand"] for axis in axes)
    base = alt.Chart(data_of(rows)).encode(axes[0], axes[1], tooltip=[down, across, value, *also])
    shown_as = alt.Legend(title=legend or title, format=value["format"])
    cells = base.mark_rect().encode(color=alt.Color(field, scale=scale, legend=shown_as))
    if not white or columns > MOST_NUMBERED:
        return styled(cells, rows_high(lines))
    numbers = base.mark_text(fontSize=10).encode(
        text=alt.Text(field, format=value["format"]),
        color=alt.when(white).then(alt.value("#fff")).otherwise(alt.value("#111")),
    )
    return styled(alt.layer(cells, numbers), rows_high(lines))


def lines_of(
    base: Any, name: str, field: str, opacity: float, *, dots: bool = False, every: int = 1
) -> tuple[Any, Any]:
    """Thin lines, one for each `name`, and what shows the one under the pointer by its values."""
    near = alt.selection_point(
        fields=[name], on="pointerover", nearest=True, empty=False, clear="pointerout"
    )
    lit = alt.when(near).then(alt.value(0.9)).otherwise(alt.value(opacity))
    dot = {"size": 25, "filled": True, "color": INK} if dots else False
    thin = base.mark_line(stroke=INK, strokeWidth=1, point=dot).encode(
        detail=f"{name}:N", opacity=lit
    )
    touch = (
        base.transform_filter(f"datum.round % {every} == 0")
        .mark_point(opacity=0, size=40)
        .encode(tooltip=[f"{name}:N", "round:Q", alt.Tooltip(f"{field}:Q", format=",.4~g")])
        .add_params(near)
    )
    return thin, touch
