"""Whom a client should hear: how alike clients' products are, and how much each counts."""

from collections.abc import Mapping
from math import inf

import torch

from fedalt.core.tree import Tree
from fedalt.methods.clustering import mean_cosines
from fedalt.methods.contract import Message
from fedalt.methods.mean import weighted_mean

Weights = Mapping[str, Mapping[str, float]]


def similarities(adapters: Mapping[str, Tree]) -> dict[str, dict[str, float]]:
    """Of each client to each other one, the mean over sites of the cosine of B A, in [-1, 1].

    Clients whose B A is zero on a site point nowhere and are left out.
    """
    cosines = mean_cosines(adapters, "BA") if adapters else torch.empty(0, 0)
    there = (~cosines.diagonal().isnan()).nonzero().flatten()
    known = [list(adapters)[at] for at in there]
    return {
        client: {other: s for other, s in zip(known, row, strict=True) if other != client}
        for client, row in zip(known, cosines[there][:, there].tolist(), strict=True)
    }


def closeness(
    similar: Mapping[str, float], *, tau: float, width: float, gap: float
) -> dict[str, float]:
    """(s - tau) / width of each other one with a similarity s above tau, at most 1.

    Only of those before the first one that is less alike by `gap` or more than the one before
    it, from the closest on: whoever does another task in the same form is above any fixed tau
    where all answer in one form.
    """
    near: dict[str, float] = {}
    last = -inf
    for other, s in sorted(similar.items(), key=lambda item: -item[1]):
        if s <= tau or last - s >= gap:
            break
        near[other] = min((s - tau) / width, 1.0)
        last = s
    return {other: near[other] for other in similar if other in near}


def shares(kin: Weights, *, beside: bool) -> dict[str, dict[str, float]]:
    """By client with kin, what of each adapter is in its mean, by the closeness of its kin.

    Its own counts 1, and all add up to 1. Where the mean stands `beside` it, its own is left out,
    and all add up to the closeness of the closest.
    """
    weights = {}
    for client, near in ((client, near) for client, near in kin.items() if near):
        counted = near if beside else {client: 1.0, **near}
        total = sum(counted.values()) / (max(near.values()) if beside else 1.0)
        weights[client] = {other: of / total for other, of in counted.items()}
    return weights


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
    """A weighted sum with A and B averaged each for itself; the sum of the weights counts in B."""
    total = sum(weights.values())
    mean = weighted_mean((k, Message(adapters[k], {"weight": w})) for k, w in weights.items())
    return {
        name._replace(slot=target): tensor * total if name.factor == "B" else tensor
        for name, tensor in mean.items()
    }
