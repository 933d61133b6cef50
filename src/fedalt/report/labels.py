"""Where the names of points go, so that nothing overlaps on a phone or on a large screen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HEIGHT = 340  # px of the plot
_WIDTHS = (260, 900)  # px of the plot on a phone and on a large screen
_LETTER, _LINE, _DOT = 6.4, 14, 5  # px of a name's letter and line, and of a point's radius


@dataclass(frozen=True)
class Side:
    """Where a name stands beside its point: `dx` and `dy` are pixels to the right and down."""

    align: Literal["left", "right"]
    dx: int
    dy: int


SIDES = (
    Side("left", 8, 0),
    Side("right", -8, 0),
    Side("left", 6, -12),
    Side("left", 6, 12),
    Side("right", -6, -12),
    Side("right", -6, 12),
)


@dataclass(frozen=True)
class Point:
    """A named point; x counts from 0, y as far as the points reach."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def sides(points: Sequence[Point]) -> list[Side | None]:
    """The side of each point's name, None where none is free; the first points choose first."""
    middles = {width: _middles(points, width) for width in _WIDTHS}
    taken = {
        width: [_Box(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in middles[width]]
        for width in _WIDTHS
    }
    chosen: list[Side | None] = []
    for at, point in enumerate(points):
        found = None
        for side in SIDES:
            boxes = {width: _name(point.name, side, *middles[width][at]) for width in _WIDTHS}
            if all(_is_free(boxes[width], width, taken[width], at) for width in _WIDTHS):
                found = side
                for width in _WIDTHS:
                    taken[width].append(boxes[width])
                break
        chosen.append(found)
    return chosen


def _middles(points: Sequence[Point], width: int) -> list[tuple[float, float]]:
    """Pixels from the left and from the top, on axes that end a little beyond the points."""
    most = max(point.x for point in points) or 1.0
    low, high = min(point.y for point in points), max(point.y for point in points)
    span = (high - low) or 1.0
    return [
        (0.95 * width * point.x / most, 0.95 * HEIGHT * (high - point.y) / span) for point in points
    ]


def _name(name: str, side: Side, x: float, y: float) -> _Box:
    long = len(name) * _LETTER
    left = x + side.dx - (long if side.align == "right" else 0)
    return _Box(left, y + side.dy - _LINE / 2, left + long, y + side.dy + _LINE / 2)


def _is_free(box: _Box, width: int, taken: Sequence[_Box], own: int) -> bool:
    """Whether a name lies within the plot and on nothing but its own point."""
    inside = box.left >= 0 and box.right <= width
    return inside and not any(box.meets(other) for at, other in enumerate(taken) if at != own)
