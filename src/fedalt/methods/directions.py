"""Adapters as lengths times directions: A = diag(a) U and B = V diag(b)."""

from typing import Final, Literal

import torch
from torch import Tensor

from fedalt.core.tree import Tree

LENGTH: Final = {"A": "a", "B": "b"}
DIRECTION: Final = {"A": "U", "B": "V"}
SHORTEST: Final = 1e-12  # what is shorter has no direction

Axis = Literal["rank", "column"]


def decompose(adapter: Tree, a_axis: Axis) -> Tree:
    """Lengths and directions of A (r, d_in) and B (d_out, r), under the names a, U, b, V.

    b is (1, r), a is (r, 1) or, by column, (1, d_in); what is zero has direction zero.
    """
    parts: Tree = {}
    for name, tensor in adapter.items():
        length = _length(name.factor, tensor, a_axis)
        parts[name._replace(factor=LENGTH[name.factor])] = length
        parts[name._replace(factor=DIRECTION[name.factor])] = tensor / length.clamp_min(SHORTEST)
    return parts


def compose(parts: Tree, a_axis: Axis) -> Tree:
    """A and B of their parts; a direction of any length counts as one of length 1."""
    adapter: Tree = {}
    for factor in ("A", "B"):
        for name in (name for name in parts if name.factor == DIRECTION[factor]):
            length = parts[name._replace(factor=LENGTH[factor])]
            unit = _unit(factor, parts[name], a_axis)
            adapter[name._replace(factor=factor)] = length * unit
    return adapter


def _length(factor: str, tensor: Tensor, a_axis: Axis) -> Tensor:
    """Norms of the rank rows of A (or of its columns) and of the columns of B."""
    by_row = factor == "A" and a_axis == "rank"
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=1 if by_row else 0, keepdim=True)
    return norms


def _unit(factor: str, tensor: Tensor, a_axis: Axis) -> Tensor:
    return tensor / _length(factor, tensor, a_axis).clamp_min(SHORTEST)


def normalise(parts: Tree, before: Tree, a_axis: Axis) -> Tree:
    """These parts, their directions brought to length 1; those that vanished stay as before."""
    normal = dict(parts)
    for name, tensor in parts.items():
        for factor in (f for f, direction in DIRECTION.items() if direction == name.factor):
            has_direction = _length(factor, tensor, a_axis) >= SHORTEST
            unit = _unit(factor, tensor, a_axis)
            normal[name] = torch.where(has_direction, unit, before[name])
    return normal
