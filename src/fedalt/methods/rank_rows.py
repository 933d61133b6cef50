"""An adapter's rank rows: row j of every A together with column j of every B.

The adapters here lie in one slot; their rank may differ from site to site.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedalt.core.tree import Name, Tree


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
    return {name: rows_of(name, rows_of(name, each)[:rank]) for name, each in adapter.items()}


def fill_up(adapter: Mapping[Name, Tensor], rest: Mapping[Name, Tensor]) -> Tree:
    """The adapter's rows and, behind them on every site, those that only `rest` is long enough for.

    Either may be empty, which stands for rank 0 on every site.
    """
    if not (adapter and rest):
        return {**adapter, **rest}
    filled: Tree = {}
    for name, each in adapter.items():
        ours, theirs = rows_of(name, each), rows_of(name, rest[name])
        filled[name] = rows_of(name, torch.cat([ours, theirs[len(ours) :]]))
    return filled
