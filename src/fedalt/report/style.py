"""How every chart of a report looks: one accent, quiet axes, ink that follows the page's colour."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from fedalt.core.foreign import shown

ACCENT, SECOND = "#3a7fc1", "#d9822b"  # told apart by colour-blind readers too
INK = "currentColor"  # dark on a light page, light on a dark one, black on paper
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


def rounds_axis(title: str = "round") -> alt.X:
    """An axis of whole numbers."""
    axis = alt.Axis(tickMinStep=1, format="d", grid=False)
    return alt.X("round:Q", title=title, axis=axis, scale=alt.Scale(nice=False))


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


def literal(value: object) -> str:
    """A value as a constant of Vega's expressions."""
    return json.dumps(value)
