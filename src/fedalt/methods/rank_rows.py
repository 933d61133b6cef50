"""An adapter's rank rows: row j of every A together with column j of every B.

The adapters here lie in one slot; their rank may differ from site to site.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fedalt.core.tree import Name, Tree, cast
from fedalt.methods.contract import Message
from fedalt.methods.low_rank_sums import Pair, Rows, add_rows, owner_mean, weighted_stack

Key = TypeVar("Key", str, Name)


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


def taken(adapter: Mapping[Name, Tensor], rows: Mapping[str, Sequence[int]]) -> Tree:
    """These rank rows of an adapter, by site, in this order."""
    return {
        name: rows_of(name, rows_of(name, factor)[rows[name.site]])
        for name, factor in adapter.items()
    }


def put(part: Mapping[Name, Tensor], rows: Mapping[str, Sequence[int]], whole: int) -> Tree:
    """The rank rows of a part where they were taken, by site, zeros elsewhere."""
    tree: Tree = {}
    for name, factor in part.items():
        ours = rows_of(name, factor)
        full = ours.new_zeros(whole, ours.shape[1])
        full[rows[name.site]] = ours
        tree[name] = rows_of(name, full)
    return tree


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


def mean_of_rows(
    replies: Iterable[tuple[str, Message]], mean: Callable[[Rows], Tensor] = owner_mean
) -> Tree:
    """Every rank row's mean over the uploads that have it, weighted by their fact "weight".

    `mean` may say otherwise what a missing row is.
    """
    totals: dict[Name, Rows] = {}
    for _, upload in replies:
        weight = float(upload.facts["weight"])
        for name, factor in upload.tree.items():
            totals[name] = add_rows(totals.get(name), rows_of(name, factor), weight)
    means = {name: rows_of(name, mean(total)) for name, total in totals.items()}
    return cast(means, torch.float32)


def pairs_of(adapter: Mapping[Name, Tensor], slot: str) -> Iterator[tuple[str, Pair]]:
    """Every site of an adapter with its product."""
    for site in sorted({name.site for name in adapter if name.slot == slot}):
        yield site, Pair(adapter[Name(site, slot, "B")], adapter[Name(site, slot, "A")])


def stack_up(stacks: dict[Key, Pair], key: Key, pair: Pair, weight: float) -> None:
    """Add weight * B A to the sum under a key, in place."""
    before = ((1.0, stacks[key]),) if key in stacks else ()
    stacks[key] = weighted_stack(*before, (weight, pair))


def stacked(replies: Iterable[tuple[str, Message]], slot: str) -> tuple[dict[str, Pair], float]:
    """Of every site sum_k w_k B_k A_k as one pair, and sum_k w_k; w_k is the fact "weight"."""
    stacks: dict[str, Pair] = {}
    weights = 0.0
    for _, upload in replies:
        weight = float(upload.facts["weight"])
        for site, pair in pairs_of(upload.tree, slot):
            stack_up(stacks, site, pair, weight)
        weights += weight
    return stacks, weights
