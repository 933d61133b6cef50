"""The words of the built-in suite: six kinds of things, and what else a sentence needs."""

from collections.abc import Mapping, Sequence
from typing import Final


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Sixteen things of every kind; no thing is of two kinds.
THINGS: Final[Mapping[str, Sequence[str]]] = {
    "animal": _listed(
        "horse goat rabbit fox mouse sheep camel duck frog wolf bear lion snake eagle whale crab"
    ),
    "food": _listed(
        "bread cheese soup rice cake apple onion butter salt egg bean pie honey carrot plum bacon"
    ),
    "tool": _listed(
        """hammer sickle axe spade rake drill needle knife rope shovel pump wrench ladder broom
        scissors chisel"""
    ),
    "clothes": _listed(
        "coat hat shoe glove scarf shirt dress boot sock belt cloak skirt apron veil jacket cap"
    ),
    "vehicle": _listed(
        "ship cart train boat wagon sled coach canoe bus bicycle truck plane raft ferry car van"
    ),
    "room": _listed(
        """kitchen cellar attic hall library stable parlour bedroom office chapel bathroom shop
        study barn loft porch"""
    ),
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
