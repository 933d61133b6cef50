"""The weighted mean of uploads, which every method that averages factor by factor forms."""

from collections.abc import Iterable

import torch

from fedalt.core.tree import Tree, accumulate, cast, scale
from fedalt.methods.contract import Message


def weighted_mean(replies: Iterable[tuple[str, Message]]) -> Tree:
    """sum_k w_k tree_k / sum_k w_k of the replies' trees, w_k being their fact "weight"; float32.

    All trees hold the same names and shapes. They are summed in float64 as they stream in, so that
    the number of clients costs neither memory nor precision. Empty where nobody replied.
    """
    total: Tree = {}
    weights = 0.0
    for _, upload in replies:
        weight = float(upload.facts["weight"])
        accumulate(total, upload.tree, weight)
        weights += weight
    return cast(scale(total, 1 / weights), torch.float32) if total else {}
