"""A tree, the only currency of fedalt: a dict from (site, slot, factor) to tensor."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Name(NamedTuple):
    """Where a tensor belongs.

    `site` is the module path of an adapted layer, `slot` the adapter it is part of, `factor` what
    it is there: "A" (rank, d_in), "B" (d_out, rank), "G" (rows, d_in) of a mixer or a router, or
    "weight" and "bias" of a trained head.
    """

    site: str
    slot: str
    factor: str

    def __str__(self) -> str:
        """Read like a path: slot/factor/site."""
        return f"{self.slot}/{self.factor}/{self.site}"


Tree = dict[Name, Tensor]

_BLOCK = 2**16  # numbers


def select(tree: Mapping[Name, Tensor], *slots: str) -> Tree:
    """The part of a tree that lies in the given slots."""
    return {name: tensor for name, tensor in tree.items() if name.slot in slots}


def move(tree: Mapping[Name, Tensor], source: str, target: str) -> Tree:
    """The adapter of slot `source`, renamed to slot `target`; other slots are left out."""
    return {
        name._replace(slot=target): tensor for name, tensor in tree.items() if name.slot == source
    }


def merge(*trees: Mapping[Name, Tensor]) -> Tree:
    """Join trees that share no name."""
    merged: Tree = {}
    for tree in trees:
        if twice := merged.keys() & tree.keys():
            raise ValueError(f"two trees both hold {min(twice)}")
        merged.update(tree)
    return merged


def replace(tree: Mapping[Name, Tensor], part: Mapping[Name, Tensor]) -> Tree:
    """The tree with some of its tensors exchanged; `part` may not bring new names."""
    if unknown := part.keys() - tree.keys():
        raise ValueError(f"the tree has no {min(unknown)} to replace")
    return {**tree, **part}


def require_same_names(got: Iterable[Name], wanted: Iterable[Name], what: str) -> None:
    """Fail, naming the first difference, unless both hold the same names."""
    got, wanted = set(got), set(wanted)
    if missing := wanted - got:
        raise ValueError(f"{what} lacks {len(missing)} tensors, first {min(missing)}")
    if extra := got - wanted:
        raise ValueError(f"{what} has {len(extra)} unexpected tensors, first {min(extra)}")


def check_tree(
    tree: Mapping[Name, Tensor], shapes: Mapping[Name, tuple[int, ...]], what: str
) -> None:
    """Fail, naming the first difference, unless the tree has exactly these names and shapes."""
    require_same_names(tree, shapes, what)
    for name in sorted(tree):
        got, wanted = tuple(tree[name].shape), tuple(shapes[name])
        if got != wanted:
            raise ValueError(f"{what}: {name} has shape {got}, but {wanted} was expected")


def apply(function: Callable[..., Any], *trees: Mapping[Name, Tensor]) -> Tree:
    """Apply a function to the tensors of the same name in every tree."""
    first, *others = trees
    for other in others:
        require_same_names(other, first, "the second tree")
    return {name: function(*(tree[name] for tree in trees)) for name in first}


def add(left: Mapping[Name, Tensor], right: Mapping[Name, Tensor]) -> Tree:
    """Element by element left + right."""
    return apply(torch.add, left, right)


def subtract(left: Mapping[Name, Tensor], right: Mapping[Name, Tensor]) -> Tree:
    """Element by element left - right."""
    return apply(torch.sub, left, right)


def scale(tree: Mapping[Name, Tensor], factor: float) -> Tree:
    """Every element times `factor`."""
    return apply(lambda tensor: tensor * factor, tree)


def accumulate(total: Tree, tree: Mapping[Name, Tensor], weight: float) -> Tree:
    """Add weight * tree to a total in float64, in its own memory; an empty total begins at zero.

    Block by block, so that the float64 copy of a block never leaves the processor's cache.
    """
    if not total:
        for name, tensor in tree.items():
            total[name] = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)

    def add_up(into: Tensor, tensor: Tensor) -> None:
        parts = zip(into.view(-1).split(_BLOCK), tensor.reshape(-1).split(_BLOCK), strict=True)
        for place, part in parts:
            place.add_(part.double(), alpha=weight)

    apply(add_up, total, tree)
    return total


def zeros_like(tree: Mapping[Name, Tensor]) -> Tree:
    """The same names and shapes, all zero."""
    return apply(torch.zeros_like, tree)


def cast(tree: Mapping[Name, Tensor], dtype: torch.dtype) -> Tree:
    """The same tree in another dtype."""
    return apply(lambda tensor: tensor.to(dtype), tree)


def copy(tree: Mapping[Name, Tensor]) -> Tree:
    """A tree of its own memory, cut from any graph."""
    return apply(lambda tensor: tensor.detach().clone(), tree)


def on(tree: Mapping[Name, Tensor], device: torch.device | str) -> Tree:
    """The same tree on another device."""
    return apply(lambda tensor: tensor.to(device), tree)


def numbers(tree: Mapping[Name, Tensor]) -> int:
    """How many numbers the tree holds."""
    return sum(tensor.numel() for tensor in tree.values())


def equal(left: Mapping[Name, Tensor], right: Mapping[Name, Tensor]) -> bool:
    """Whether both hold the same names and bit for bit the same tensors."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )
