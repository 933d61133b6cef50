"""Which low-rank slots every adapted site has, and how their outputs combine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedalt.core.tree import Name

MIXER = "mixer"
ROUTER = "router"
HEAD = "head"

Layout = Literal["paper", "code"]


class Shape(NamedTuple):
    """Sizes of one adapted linear layer."""

    d_in: int
    d_out: int


@dataclass(frozen=True)
class Slot:
    """One low-rank pair on every site; its output is scaled by alpha / rank."""

    name: str
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} of slot {self.name!r}, but a rank is at least 1")
        if self.name in (MIXER, ROUTER, HEAD):
            raise ValueError(f"a slot cannot be called {self.name!r}")

    @property
    def scaling(self) -> float:
        """What the output of B A is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Sum:
    """Add the slots' outputs, each times a fixed weight."""

    weights: tuple[float, ...]


@dataclass(frozen=True)
class Mixer:
    """Weigh the slots' outputs by a softmax over slots, token by token, from the site's input."""


@dataclass(frozen=True)
class Similarity:
    """Weigh two slots example by example, by how much a prompt is like the client's own prompts.

    The slot at index `on` gets `scale` times the mean cosine between the prompt and the client's
    reference prompts, the other slot the rest to 1; both as the slot at index `embeds` alone sees
    them. Who binds such a plan brings the weights: it has no part in training.
    """

    scale: float
    on: int
    embeds: int


@dataclass(frozen=True)
class Router:
    """Weigh the M slots' outputs by a sparse choice, token by token, from the site's input.

    Of a softmax over 2M - 1 rows the M largest count, each for the slot it is mapped to. The slot
    at index `own` has M rows and is chosen for every token; each other slot has one. `renormalise`
    divides by the chosen rows' sum, else a token's weights sum to less than 1. With one slot the
    router decides nothing.
    """

    own: int
    layout: Layout
    renormalise: bool

    def slot_map(self, slots: int) -> tuple[int, ...]:
        """The slot's index of each of the 2 * slots - 1 rows.

        FedLEASE's paper puts the own rows first, then the others in order; its authors' code one
        row of every slot first, then the other own rows.
        """
        every = range(slots)
        match self.layout:
            case "paper":
                return (*(self.own for _ in every), *(slot for slot in every if slot != self.own))
            case "code":
                return (*every, *(self.own for _ in every[1:]))


@dataclass(frozen=True)
class Plan:
    """The slots of a site in the order of the mixer's rows, how they combine, and their dropout.

    `dropout` is the probability in [0, 1) of zeroing an input element while training; all slots
    share one mask, a mixer or router sees the undropped input.
    """

    slots: tuple[Slot, ...]
    combine: Sum | Mixer | Router | Similarity
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.slots:
            raise ValueError("a plan has at least one slot")
        names = [slot.name for slot in self.slots]
        if len(set(names)) < len(names):
            raise ValueError(f"slots of a plan need different names, got {names}")
        if isinstance(self.combine, Sum) and len(self.combine.weights) != len(self.slots):
            raise ValueError(f"{len(self.combine.weights)} weights for {len(self.slots)} slots")
        if isinstance(self.combine, Similarity) and len(self.slots) != 2:
            raise ValueError(f"similarity weighs two slots, got {len(self.slots)}")
        if isinstance(self.combine, Router) and not 0 <= self.combine.own < len(self.slots):
            raise ValueError(f"own={self.combine.own} of a router over {len(self.slots)} slots")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, but it is at least 0 and below 1")

    @property
    def gate(self) -> tuple[str, int] | None:
        """Slot and number of rows of the tensor G that weighs the slots; None where none does."""
        match self.combine:
            case Mixer():
                return MIXER, len(self.slots)
            case Router():
                return ROUTER, 2 * len(self.slots) - 1
            case Sum() | Similarity():
                return None

    def shapes(self, sites: Mapping[str, Shape]) -> dict[Name, tuple[int, ...]]:
        """Name and shape of every tensor this plan needs on the given sites, heads excluded."""
        needed: dict[Name, tuple[int, ...]] = {}
        for site, (d_in, d_out) in sites.items():
            for slot in self.slots:
                needed[Name(site, slot.name, "A")] = (slot.rank, d_in)
                needed[Name(site, slot.name, "B")] = (d_out, slot.rank)
            if self.gate is not None:
                slot_of_g, rows = self.gate
                needed[Name(site, slot_of_g, "G")] = (rows, d_in)
        return needed


def single(slot: Slot, dropout: float = 0.0) -> Plan:
    """Plain LoRA: one slot with weight 1."""
    return Plan((slot,), Sum((1.0,)), dropout)


def names_of(tree: Iterable[Name], *slots: str) -> frozenset[Name]:
    """The names that lie in the given slots."""
    return frozenset(name for name in tree if name.slot in slots)
