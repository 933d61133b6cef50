"""Adapters of many clients side by side, for passes in which every row has a client of its own.

Training stacks the trees of the clients that share a pass. A server's rows come and go with every
token, so here the factors of whoever is asked stay in places, joined as the arithmetic wants them;
another client is copied into a place that no row uses.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from fedalt.adapters.lowrank import Combination, Joined, times
from fedalt.adapters.plan import Plan, Router, Shape, Similarity, Sum
from fedalt.core.tree import Name, Tree

# Slots with fixed weights are one slot whose B holds the weights; zeros fill up a smaller rank.
SUM: Final = Combination((), (1.0,), (1.0,))


@dataclass(frozen=True)
class Joint:
    """A client's factors side by side.

    Those of equal `kind` share passes. By site: `down` (R + rows of G, d_in), `up` (d_out, R).
    """

    kind: Combination
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]


def joint(plan: Plan, tree: Tree, sites: Sequence[str]) -> Joint:
    """The factors of a tree under a plan; a router's own slot comes first."""
    slots, combine = list(plan.slots), plan.combine
    kind = SUM
    if isinstance(combine, Router):
        slots.insert(0, slots.pop(combine.own))
        combine = replace(combine, own=0)
    if not isinstance(combine, Sum):
        kind = Combination(
            ranks=tuple(slot.rank for slot in slots),
            scalings=tuple(slot.scaling for slot in slots),
            weights=None,
            router=combine if isinstance(combine, Router) else None,
        )
        if isinstance(combine, Similarity):
            kind = replace(kind, weights=(0.0,) * len(slots))  # each row brings its own
    down, up = {}, {}
    for site in sites:
        a = [tree[Name(site, slot.name, "A")] for slot in slots]
        b = [tree[Name(site, slot.name, "B")] for slot in slots]
        if isinstance(combine, Sum):
            weights = zip(slots, combine.weights, strict=True)
            b = [slot.scaling * w * part for (slot, w), part in zip(weights, b, strict=True)]
        g = [] if plan.gate is None else [_rows_of(plan, tree[Name(site, plan.gate[0], "G")])]
        down[site], up[site] = torch.cat([*a, *g]), torch.cat(b, 1)
    return Joint(kind, down, up)


def _rows_of(plan: Plan, g: Tensor) -> Tensor:
    """G with its rows in the order of the slots, of which a router's own one is the first."""
    combine = plan.combine
    if not isinstance(combine, Router) or combine.layout == "paper":
        return g
    every = list(range(len(plan.slots)))
    every.insert(0, every.pop(combine.own))
    return torch.cat([g[every], g[len(every) :]])


class Shelf:
    """Places for factors of one kind; there are as many as have been in use at once."""

    def __init__(self, kind: Combination, sites: Mapping[str, Shape], like: Tensor) -> None:
        """`like` has the device and dtype that the base model computes with."""
        self.kind = kind
        slots = len(kind.ranks)
        gates = 0 if kind.weights is not None else slots if kind.router is None else 2 * slots - 1
        rank = max(sum(kind.ranks), 1)
        self._down = {
            site: like.new_zeros(1, rank + gates, shape.d_in) for site, shape in sites.items()
        }
        self._up = {site: like.new_zeros(1, rank, shape.d_out) for site, shape in sites.items()}
        self._held: list[Hashable] = [None]

    def place(self, key: Hashable, factors: Joint | None, in_use: Collection[int]) -> int:
        """Where the factors are that a key names; None adds nothing to the base model.

        If they are on the shelf no more, they are put to a place that is not in use.
        """
        if key in self._held:
            return self._held.index(key)
        place = next((at for at in range(len(self._held)) if at not in in_use), len(self._held))
        if place == len(self._held):
            self._pad(0, place)
            self._held += [None] * place
        self._held[place] = key
        for site, down in self._down.items():
            down[place].zero_()
            self._up[site][place].zero_()
        if factors is not None:
            self._put(place, factors)
        return place

    def _put(self, place: int, factors: Joint) -> None:
        rank = next(iter(factors.down.values())).shape[0]
        if (more := rank - next(iter(self._down.values())).shape[1]) > 0:
            self._pad(1, more)
        for site, down in factors.down.items():
            self._down[site][place, : len(down)] = down
            up = factors.up[site].T
            self._up[site][place, : len(up)] = up

    def _pad(self, axis: int, more: int) -> None:
        """More places (axis 0) or a higher rank (axis 1)."""
        for tensors in (self._down, self._up):
            for site, tensor in tensors.items():
                room = tensor.new_zeros(*tensor.shape[:axis], more, *tensor.shape[axis + 1 :])
                tensors[site] = torch.cat([tensor, room], axis)

    def rows(self, places: Sequence[int], weights: Tensor | None = None) -> "Rows":
        """What rows whose factors are at these places are bound to.

        `weights` (rows, slots) are those of the slots, for a kind where each row brings its own.
        """
        first, among = min(places), max(places) + 1 - min(places)
        order: list[int] = [0] * among  # rows so far, by place
        nth = []
        for place in places:
            nth.append(order[place - first])
            order[place - first] += 1
        deep = max(order)
        index = [(place - first) * deep + at for place, at in zip(places, nth, strict=True)]
        device = next(iter(self._up.values())).device
        return Rows(
            self,
            slice(first, first + among),
            deep,
            None if index == [*range(among * deep)] else torch.tensor(index, device=device),
            len(places),
            None if weights is None else weights.to(device),
        )

    def joined(self, site: str, places: slice, dtype: torch.dtype) -> Joined:
        """The factors at some places."""
        return Joined(self._down[site][places].to(dtype), self._up[site][places].to(dtype).mT)


@dataclass(frozen=True)
class Rows:
    """Rows of a batch, each with the factors at a place of a shelf; see `Shelf.rows`.

    `deep` rows fit to each of the `places`. `index` (rows,) is where among these a row belongs;
    None: they are in that order, and nothing is empty.
    """

    shelf: Shelf
    places: slice
    deep: int
    index: Tensor | None
    count: int
    weights: Tensor | None

    def adapt(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """See `binding.Adapters`."""
        x = x.reshape(self.count, -1, x.shape[-1]).to(y.dtype)
        joined = self.shelf.joined(site, self.places, y.dtype)
        combination = self.shelf.kind
        if combination is SUM:
            combination = replace(SUM, ranks=(joined.b.shape[2],))
        elif self.weights is not None:
            weights = self.weights[:, None].expand(-1, x.shape[1], -1)
            combination = replace(combination, weights=self._spread(weights))
        z = joined.mixed(self._spread(x), None, combination)
        low = self._collect(times(z, joined.b.mT, None), x.shape[1])
        return y + low.reshape(y.shape)

    def project(self, site: str, x: Tensor) -> Tensor:
        """Never asked: who is classified gets no text written."""
        raise NotImplementedError(f"rows have no head for {site}, {tuple(x.shape)}")

    def _spread(self, x: Tensor) -> Tensor:
        """(rows, tokens, d) -> (places, deep * tokens, d), zeros where no row is."""
        places = self.places.stop - self.places.start
        if self.index is not None:
            room = x.new_zeros(places * self.deep, *x.shape[1:])
            x = room.index_copy_(0, self.index, x)
        return x.reshape(places, -1, x.shape[-1])

    def _collect(self, x: Tensor, tokens: int) -> Tensor:
        """(places, deep * tokens, d) -> (rows, tokens, d)."""
        x = x.reshape(-1, tokens, x.shape[-1])
        return x if self.index is None else x[self.index]
