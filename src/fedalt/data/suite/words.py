"""The words of the built-in suite: six kinds of things, and what else a sentence needs."""

from collections.abc import Mapping, Sequence
from typing import Final


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Eight things of every kind; no thing is of two kinds.
THINGS: Final[Mapping[str, Sequence[str]]] = {
    "animal": _listed("horse goat rabbit fox mouse sheep camel duck"),
    "food": _listed("bread cheese soup rice cake apple onion butter"),
    "tool": _listed("hammer sickle axe spade rake drill needle knife"),
    "clothes": _listed("coat hat shoe glove scarf shirt dress boot"),
    "vehicle": _listed("ship cart train boat wagon sled coach canoe"),
    "room": _listed("kitchen cellar attic hall library stable parlour bedroom"),
}
KINDS: Final = tuple(THINGS)

# Another word for every kind, in the same order.
OTHER_WORDS: Final = _listed("beast meal device garment carriage chamber")

# Few: what a sentence says besides its thing is noise, and more of it hides more from little data.
NAMES: Final = _listed(
    """Anna Ben Carl Dora Emma Fred Greta Hugo Ida John Kate Louis Mary Nora Otto Paul Rose Sam Tom
    Will"""
)
LOOKS: Final = _listed("big blue clean fine heavy new old plain red small")
