"""What a method's settings may be, each for itself and beside others, and the error of it."""

from dataclasses import fields
from math import inf
from typing import Any


def check(settings: object, **intervals: str) -> None:
    """Raise ValueError for the first field outside its interval; None stands for unset.

    An interval is written as in mathematics: "[0, 1)" holds 0 and not 1, "(0, inf)" has no end.
    NaN is in none.
    """
    for name, interval in intervals.items():
        value = vars(settings)[name]
        least, most = (float(end) for end in interval[1:-1].split(","))
        closed, closed_above = interval[0] == "[", interval[-1] == "]"
        if value is None or (
            (least <= value if closed else least < value)
            and (value <= most if closed_above else value < most)
        ):
            continue
        raise ValueError(f"{name}={value}, but {_words(least, most, closed, closed_above)}")


def only_with(settings: Any, name: str, value: object, *others: str) -> None:
    """Raise ValueError for the first of `others` that is set where `name` has not this value.

    They mean nothing then, and a run whose setting does nothing would be told apart from one
    without it. A field counts as set if it does not have its default.
    """
    if getattr(settings, name) == value:
        return
    defaults = {item.name: item.default for item in fields(settings)}
    for other in others:
        if (given := getattr(settings, other)) != defaults[other]:
            raise ValueError(
                f"{other}={given!r} is only for {name}={value!r}, and here "
                f"{name}={getattr(settings, name)!r}"
            )


def _words(least: float, most: float, closed: bool, closed_above: bool) -> str:
    if most == inf:
        if closed:
            return f"it is at least {least:g}" if least else "it cannot be negative"
        return f"it must be above {least:g}"
    if closed and closed_above:
        return f"it lies between {least:g} and {most:g}"
    lower, upper = ("at least" if closed else "above"), ("at most" if closed_above else "below")
    return f"it is {lower} {least:g} and {upper} {most:g}"
