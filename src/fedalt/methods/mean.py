"""The weighted mean of uploads, which every method that averages factor by factor forms."""

from collections.abc import Iterable

import torch

from fedalt.core.tree import Tree, accumulate, cast, scale
from fedalt.methods.contract import Message


def weighted_mean(replies: Iterable[tuple[str, Message]]) -> Tree:
    """sum_k w_k tree_k / sum_k w_k of the replies' trees, w_k being their fact "weight"; float32.

    All trees hold the same names and shapes. Empty where nobody replied.
    """
    totals = Totals()
    for _, upload in replies:
        totals.add(0, upload)
    return dict(totals.means()).get(0, {})


class Totals:
    """Weighted sums of uploads, by group, from which their means are formed.

    They are summed in float64 as they come in, so that the number of clients costs neither memory
    nor precision.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tree] = {}
        self._weights: dict[int, float] = {}

    def add(self, group: int, upload: Message) -> None:
        """Count an upload in, by its fact "weight"."""
        weight = float(upload.facts["weight"])
        accumulate(self._sums.setdefault(group, {}), upload.tree, weight)
        self._weights[group] = self._weights.get(group, 0.0) + weight

    def means(self) -> list[tuple[int, Tree]]:
        """The mean of every group, in float32, by the number of the group."""
        return [
            (group, cast(scale(self._sums[group], 1 / self._weights[group]), torch.float32))
            for group in sorted(self._sums)
        ]
