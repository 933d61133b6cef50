"""Intervals of a method's settings, and the error of a value outside its own."""

from math import inf


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


def _words(least: float, most: float, closed: bool, closed_above: bool) -> str:
    if most == inf:
        if closed:
            return f"it is at least {least:g}" if least else "it cannot be negative"
        return f"it must be above {least:g}"
    if closed and closed_above:
        return f"it lies between {least:g} and {most:g}"
    lower, upper = ("at least" if closed else "above"), ("at most" if closed_above else "below")
    return f"it is {lower} {least:g} and {upper} {most:g}"
