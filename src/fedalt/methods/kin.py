"""Whom a client should hear: how alike clients' products are, weights, and sums of products."""

from collections.abc import Mapping
from math import inf

import torch
from torch.nn.functional import pad

from fedalt.core.tree import Name, Tree
from fedalt.methods.clustering import distances, has_direction
from fedalt.methods.contract import Message
from fedalt.methods.low_rank_sums import Pair, core_svd, factors, strongest, weighted_stack
from fedalt.methods.mean import weighted_mean


def similarities(adapters: Mapping[str, Tree]) -> dict[str, dict[str, float]]:
    """Of each client to each other one, the mean over sites of the cosine of B A, in [-1, 1].

    Clients whose B A is zero on a site point nowhere and are left out.
    """
    known = {client: tree for client, tree in adapters.items() if has_direction(tree, "BA")}
    cosines = (1 - distances(known, "BA")).tolist() if known else []
    return {
        client: {other: s for other, s in zip(known, row, strict=True) if other != client}
        for client, row in zip(known, cosines, strict=True)
    }


def closeness(
    similar: Mapping[str, float], *, tau: float, width: float, gap: float | None = None
) -> dict[str, float]:
    """(s - tau) / width of each other one with a similarity s above tau, at most 1.

    With a `gap`, only of those before the first one that is so much less alike than the one
    before it, from the closest on: whoever does another task in the same form is above any fixed
    tau where all answer in one form.
    """
    near: dict[str, float] = {}
    last = -inf
    for other, s in sorted(similar.items(), key=lambda item: -item[1]):
        if s <= tau or (gap is not None and last - s >= gap):
            break
        near[other] = min((s - tau) / width, 1.0)
        last = s
    return {other: near[other] for other in similar if other in near}


def sum_of_products(
    adapters: Mapping[str, Tree], weights: Mapping[str, float], target: str, rank: int
) -> Tree:
    """sum_j w_j B_j A_j on every site, cut to its `rank` strongest directions, in slot `target`.

    Summed in float64 and exact before the cut. All of the strength lies in B; where there are
    fewer directions, rows and columns of zeros fill up.
    """
    tree: Tree = {}
    for name in (name for name in adapters[min(weights)] if name.factor == "B"):
        a = name._replace(factor="A")
        pairs = ((w, Pair(adapters[k][name], adapters[k][a])) for k, w in weights.items())
        pair = factors(strongest(core_svd(weighted_stack(*pairs)), rank), "in_b")
        missing = rank - len(pair.a)
        tree[Name(name.site, target, "A")] = pad(pair.a, (0, 0, 0, missing)).to(torch.float32)
        tree[Name(name.site, target, "B")] = pad(pair.b, (0, missing)).to(torch.float32)
    return tree


def trainable(start: Tree, own: Tree) -> Tree:
    """The client's own adapter or, if there is one, a start with rows of its own A for zeros.

    That changes no product; with zeros in A and B a rank row could never train again.
    """
    return {
        name: torch.where(t.any(1, keepdim=True), t, own[name]) if name.factor == "A" else t
        for name, t in (start or own).items()
    }


def mean_of_factors(
    adapters: Mapping[str, Tree], weights: Mapping[str, float], target: str
) -> Tree:
    """The same with A and B averaged each for itself; the sum of the weights counts in B."""
    total = sum(weights.values())
    mean = weighted_mean((k, Message(adapters[k], {"weight": w})) for k, w in weights.items())
    return {
        name._replace(slot=target): tensor * total if name.factor == "B" else tensor
        for name, tensor in mean.items()
    }
