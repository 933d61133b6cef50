"""The weighted mean of clients' products B A, by group, which is never formed as a matrix."""

from collections.abc import Iterator, Mapping

import torch

from fedalt.core.tree import Name, Tree, cast
from fedalt.methods.contract import Message
from fedalt.methods.low_rank_sums import Pair, core_svd, strongest
from fedalt.methods.rank_rows import fill_up, stack_up


class ProductTotals:
    """Weighted sums of uploads' products, by group and by the name of B; exact, in float64."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[Name, Pair]] = {}
        self._weights: dict[int, float] = {}

    def add(self, group: int, upload: Message) -> None:
        """Count an upload in, by its fact "weight"."""
        weight = float(upload.facts["weight"])
        sums = self._sums.setdefault(group, {})
        for name in (name for name in upload.tree if name.factor == "B"):
            pair = Pair(upload.tree[name], upload.tree[name._replace(factor="A")])
            stack_up(sums, name, pair, weight)
        self._weights[group] = self._weights.get(group, 0.0) + weight

    def means(self) -> Iterator[tuple[int, dict[Name, Pair]]]:
        """Of every group, by its number, sum_k w_k B_k A_k / sum_k w_k on every site."""
        for group in sorted(self._sums):
            weight = self._weights[group]
            pairs = self._sums[group].items()
            yield group, {name: Pair(pair.b / weight, pair.a) for name, pair in pairs}


def as_adapter(products: Mapping[Name, Pair], before: Tree) -> Tree:
    """The strongest directions U S V^T of each product as B = U and A = S V^T, in float32.

    Slot and rank are those of `before`, the adapter in whose place they come. Rows that there is no
    direction for have its A, and a B of zero: so they change nothing and can be trained.
    """
    found: Tree = {}
    rest = {n: t if n.factor == "A" else torch.zeros_like(t) for n, t in before.items()}
    sites = {name.site: product for name, product in products.items()}
    for name in (name for name in before if name.factor == "B"):
        u, s, v = strongest(core_svd(sites[name.site]), before[name].shape[1])
        found[name], found[name._replace(factor="A")] = u, (v * s).T
    return fill_up(cast(found, torch.float32), rest)
