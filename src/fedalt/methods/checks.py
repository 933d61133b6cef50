"""Ranges of a method's settings, and the error of a value outside its own."""

from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """Which values a setting may have, and how an error says so."""

    holds: Callable[[float], bool]
    words: str


def at_least(least: float) -> Range:
    """[least, infinity)."""
    words = f"it is at least {least}" if least else "it cannot be negative"
    return Range(lambda value: value >= least, words)


def above(bound: float) -> Range:
    """(bound, infinity)."""
    return Range(lambda value: value > bound, f"it must be above {bound}")


def between(least: float, most: float) -> Range:
    """[least, most]."""
    return Range(lambda value: least <= value <= most, f"it lies between {least} and {most}")


def strictly_between(bound: float, other: float) -> Range:
    """(bound, other)."""
    return Range(lambda value: bound < value < other, f"it is above {bound} and below {other}")


def from_to_below(least: float, bound: float) -> Range:
    """[least, bound)."""
    words = f"it is at least {least} and below {bound}"
    return Range(lambda value: least <= value < bound, words)


def above_up_to(bound: float, most: float) -> Range:
    """(bound, most]."""
    return Range(lambda value: bound < value <= most, f"it is above {bound} and at most {most}")


def check(settings: object, **ranges: Range) -> None:
    """Raise ValueError for the first field outside its range; None and NaN: unset, and outside."""
    for name, allowed in ranges.items():
        value = vars(settings)[name]
        if value is not None and not allowed.holds(value):
            raise ValueError(f"{name}={value}, but {allowed.words}")
