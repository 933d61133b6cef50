"""The tensors every client starts from, drawn from the run's seed and from nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedalt.adapters.plan import HEAD, MIXER, Shape, Slot
from fedalt.core.seeds import generator
from fedalt.core.tree import Name, Tree

MixerInit = Literal["kaiming", "zeros"]


@dataclass(frozen=True)
class Initializer:
    """Draws initial adapters for the sites of a base model.

    Each tensor has a stream of its own, named by the run's seed and the site: all clients draw the
    same values, all methods start from the same A, and one more site changes no other.
    `heads` holds name and shape of the tensors of a trained head (none for causal models).
    `clients` is how many clients the federation has, 0 where that is not known. `given` are tensors
    that begin as the base model's checkpoint has them.
    """

    sites: Mapping[str, Shape]
    heads: Mapping[Name, tuple[int, ...]]
    seed: int
    clients: int = 0
    given: Mapping[Name, Tensor] = field(default_factory=dict, repr=False)

    def adapter(self, slot: Slot, *, only_for: str = "", apart: bool = False) -> Tree:
        """A: uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt(5)); B: zeros.

        `only_for` names a client that shall draw an A of its own instead of the common one.
        `apart` is for the second adapter that a client trains: the slot's name is then part of the
        stream's. Two adapters with one A span r directions between them, not 2 r, and with B = 0
        they take the same first steps.
        """
        tree: Tree = {}
        for site, (d_in, d_out) in self.sites.items():
            key = (site, only_for, slot.name) if apart else (site, only_for)
            tree[Name(site, slot.name, "A")] = _draw(slot.rank, d_in, self.seed, *key)
            tree[Name(site, slot.name, "B")] = torch.zeros(d_out, slot.rank)
        return tree

    def mixer(self, slots: int, init: MixerInit = "kaiming") -> Tree:
        """G: (slots, d_in) per site, drawn like A, or zeros for equal weights at the start."""
        tree: Tree = {}
        for site, (d_in, _) in self.sites.items():
            g = torch.zeros(slots, d_in)
            if init == "kaiming":
                g.uniform_(-1, 1, generator=generator(self.seed, "G", site)).div_(d_in**0.5)
            tree[Name(site, MIXER, "G")] = g
        return tree

    def head(self) -> Tree:
        """Weights: normal, deviation 0.02; biases: zeros; or as given. Empty for causal models."""
        tree: Tree = {}
        for name, shape in self.heads.items():
            assert name.slot == HEAD
            tensor = torch.zeros(shape)
            if name in self.given:
                tensor.copy_(self.given[name])
            elif name.factor == "weight":
                tensor.normal_(0, 0.02, generator=generator(self.seed, HEAD, name.site))
            tree[name] = tensor
        return tree


def drawn_again(adapter: Mapping[Name, Tensor], seed: int, times: int) -> Tree:
    """An adapter as `Initializer.adapter` draws it, drawn anew as often as `times` says.

    0 leaves it as it is. Every other number has a stream of its own, the same for all clients of
    one rank; `seed` is the run's.
    """
    if not times:
        return dict(adapter)
    tree: Tree = {}
    for name, tensor in adapter.items():
        rows, columns = tensor.shape
        of_a = name.factor == "A"
        tree[name] = (
            _draw(rows, columns, seed, name.site, times) if of_a else torch.zeros_like(tensor)
        )
    return tree


def _draw(rank: int, d_in: int, seed: int, *key: str | int) -> Tensor:
    """A (rank, d_in): uniform in +-1/sqrt(d_in), which is Kaiming's with a = sqrt(5)."""
    a = torch.empty(rank, d_in).uniform_(-1, 1, generator=generator(seed, "A", *key))
    return a / float(d_in**0.5)
