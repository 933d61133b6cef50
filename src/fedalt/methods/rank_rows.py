"""An adapter's rank rows: row j of every A together with column j of every B.

The adapters here lie in one slot; their rank may differ from site to site.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedalt.core.tree import Name, Tree, cast
from fedalt.methods.contract import Message
from fedalt.methods.low_rank_sums import Pair, Rows, add_rows, owner_mean, weighted_stack


def rows_of(name: Name, factor: Tensor) -> Tensor:
    """A factor with its rank first, (rank, d); applied again, the factor as it was."""
    return factor if name.factor == "A" else factor.T


def rank_of(adapter: Mapping[Name, Tensor]) -> int:
    """The rank of an adapter that has the same one on every site."""
    ranks = {len(rows_of(name, factor)) for name, factor in adapter.items()}
    if len(ranks) != 1:
        raise ValueError(f"an adapter of one rank was expected, got ranks {sorted(ranks)}")
    return ranks.pop()


def first_rows(adapter: Mapping[Name, Tensor], rank: int) -> Tree:
    """The first rows, at most `rank` of them."""
    return {name: rows_of(name, rows_of(name, factor)[:rank]) for name, factor in adapter.items()}


def fill_up(adapter: Mapping[Name, Tensor], rest: Mapping[Name, Tensor]) -> Tree:
    """The adapter's rows and, behind them on every site, those that only `rest` is long enough for.

    Either may be empty, which stands for rank 0 on every site.
    """
    if not (adapter and rest):
        return {**adapter, **rest}
    filled: Tree = {}
    for name, factor in adapter.items():
        ours, theirs = rows_of(name, factor), rows_of(name, rest[name])
        filled[name] = rows_of(name, torch.cat([ours, theirs[len(ours) :]]))
    return filled


def mean_of_rows(replies: Iterable[tuple[str, Message]]) -> Tree:
    """Every rank row's mean over the uploads that have it, weighted by their fact "weight"."""
    totals: dict[Name, Rows] = {}
    for _, upload in replies:
        weight = float(upload.facts["weight"])
        for name, factor in upload.tree.items():
            totals[name] = add_rows(totals.get(name), rows_of(name, factor), weight)
    means = {name: rows_of(name, owner_mean(total)) for name, total in totals.items()}
    return cast(means, torch.float32)


def stacked(replies: Iterable[tuple[str, Message]], slot: str) -> tuple[dict[str, Pair], float]:
    """Of every site sum_k w_k B_k A_k as one pair, and sum_k w_k; w_k is the fact "weight"."""
    stacks: dict[str, Pair] = {}
    weights = 0.0
    for _, upload in replies:
        weight = float(upload.facts["weight"])
        for site in {name.site for name in upload.tree}:
            a, b = (upload.tree[Name(site, slot, factor)] for factor in "AB")
            before = ((1.0, stacks[site]),) if site in stacks else ()
            stacks[site] = weighted_stack(*before, (weight, Pair(b, a)))
        weights += weight
    return stacks, weights
