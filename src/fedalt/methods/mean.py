"""The weighted mean of uploads, which every method that averages factor by factor forms."""

from collections.abc import Iterable
from typing import Final

import torch

from fedalt.core.tree import Tree, accumulate, cast, scale
from fedalt.methods.contract import Message

NOTHING: Final = Message({}, {"weight": 0.0})  # the total of no uploads


def weighted_mean(replies: Iterable[tuple[str, Message]]) -> Tree:
    """sum_k w_k tree_k / sum_k w_k of the replies' trees, w_k being their fact "weight"; float32.

    All trees hold the same names and shapes. They are summed in float64 as they stream in, so that
    the number of clients costs neither memory nor precision. Empty where nobody replied.
    """
    total = NOTHING
    for _, upload in replies:
        total = plus(total, upload)
    return mean_of(total)


def plus(total: Message, upload: Message) -> Message:
    """A total of weighted uploads, in its own float64 memory, and one more of them."""
    weight = float(upload.facts["weight"])
    tree = accumulate(total.tree or {}, upload.tree, weight)  # not NOTHING's own, which all share
    return Message(tree, {"weight": float(total.facts["weight"]) + weight})


def mean_of(total: Message) -> Tree:
    """A total divided by its weight, in float32; empty where nothing was added up."""
    weight = float(total.facts["weight"])
    return cast(scale(total.tree, 1 / weight), torch.float32) if total.tree else {}
