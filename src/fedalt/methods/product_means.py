"""The weighted mean of clients' products B A, by group, which is never formed as a matrix."""

from collections.abc import Iterator

from fedalt.core.tree import Name
from fedalt.methods.contract import Message
from fedalt.methods.low_rank_sums import Pair, weighted_stack


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
            before = ((1.0, sums[name]),) if name in sums else ()
            sums[name] = weighted_stack(*before, (weight, pair))
        self._weights[group] = self._weights.get(group, 0.0) + weight

    def means(self) -> Iterator[tuple[int, dict[Name, Pair]]]:
        """Of every group, by its number, sum_k w_k B_k A_k / sum_k w_k on every site."""
        for group in sorted(self._sums):
            weight = self._weights[group]
            pairs = self._sums[group].items()
            yield group, {name: Pair(pair.b / weight, pair.a) for name, pair in pairs}
