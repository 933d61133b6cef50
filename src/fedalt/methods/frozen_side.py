"""The frozen side: low-rank sums that a method adds to the base model for good, kept as one slot.

Published code adds them to W0. Here W0 stays the checkpoint's, so that a base model may be
quantised and is known by its digest, and what was added lies in a slot that nobody trains. Its rank
grows with every round and ends at the lesser of d_out and d_in, since no such matrix has more.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from fedalt.adapters.plan import Plan, Slot, Sum, single
from fedalt.core.tree import Name, Tree, cast, merge
from fedalt.methods.contract import Serving
from fedalt.methods.low_rank_sums import Pair, core_svd, factors
from fedalt.methods.rank_rows import pairs_of, rows_of, stack_up

FROZEN = "frozen"


def added(frozen: Tree, sums: Mapping[str, Pair], weight: float) -> Tree:
    """The frozen side plus weight * B A on every site of `sums`, exactly, in as few rank rows.

    Exactly means to float32's precision. The rank may differ from site to site; the tree is empty
    where nothing has been added.
    """
    stacks = dict(pairs_of(frozen, FROZEN))
    for site, pair in sums.items():
        stack_up(stacks, site, pair, weight)
    tree: Tree = {}
    for site, stack in stacks.items():
        b, a = factors(core_svd(stack), "in_b")
        tree[Name(site, FROZEN, "A")], tree[Name(site, FROZEN, "B")] = a, b
    return cast(tree, torch.float32) if _rank(tree) else {}


def on_top(frozen: Tree, slot: Slot, adapter: Tree, head: Tree, dropout: float) -> Serving:
    """An adapter beside the frozen side, with the same scaling; alone where there is none yet."""
    if not frozen:
        return Serving(single(slot, dropout), merge(adapter, head))
    slots = (slot, _slot(frozen, slot.scaling))
    plan = Plan(slots, Sum((1.0, 1.0)), dropout)
    return Serving(plan, merge(adapter, _even(frozen), head))


def alone(frozen: Tree, scaling: float, head: Tree, dropout: float) -> Serving:
    """The frozen side, which is not empty, and nothing beside it."""
    return Serving(single(_slot(frozen, scaling), dropout), merge(_even(frozen), head))


def _slot(frozen: Tree, scaling: float) -> Slot:
    rank = _rank(frozen)
    return Slot(FROZEN, rank, scaling * rank)


def _rank(frozen: Tree) -> int:
    """The largest rank of any site.

    Raises ValueError for one that no matrix of its size has: rows of zeros for all other sites
    would make a small message of a stranger fill the memory.
    """
    largest = 0
    for site, (b, a) in pairs_of(frozen, FROZEN):
        if len(a) > (most := min(len(b), a.shape[1])):
            raise ValueError(f"the frozen side of {site} has rank {len(a)}, but at most {most}")
        largest = max(largest, len(a))
    return largest


def _even(frozen: Tree) -> Tree:
    """The same products with one rank on all sites, as a slot has: filled up with rows of zeros."""
    rank = _rank(frozen)
    tree: Tree = {}
    for name, factor in frozen.items():
        rows = rows_of(name, factor)
        tree[name] = rows_of(name, pad(rows, (0, 0, 0, rank - len(rows))))
    return tree
