"""JSON that somebody else has written: what Python would read as something else is an error."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Final

from fedalt.core.foreign import shown


class RepeatedKeyError(ValueError):
    """An object that gives a key twice; Python would keep the last value without a word."""


def _each_key_once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise RepeatedKeyError(f"the key {shown(repr(twice), 80)} is given twice in one object")
    return value


DECODER: Final = json.JSONDecoder(object_pairs_hook=_each_key_once)


def parsed(text: str) -> object:
    """The value of a JSON text. Raises RepeatedKeyError, and what the json module raises."""
    return DECODER.decode(text)
