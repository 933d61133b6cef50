"""Gaps between methods: tests over clients, intervals over clients and seeds, metric by metric.

Seeds of one client share its data and its test items, so they are not further observations of
whether a method is better: a client's gap is its mean over the seeds, and clients are what is
counted. Gaps of accuracy, of ROUGE-L and of loss have different units and are never put together.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, wilcoxon

from fedalt.report.sheet import csv_text, markdown
from fedalt.report.table import Row, Table

SIGNIFICANT: Final = 0.05
DRAWS: Final = 10_000
_EXACT: Final = 50  # clients; of more, the normal distribution is as good
_DIGITS: Final = 9  # behind the point; beyond them is what rounding adds to a mean over seeds
GAP_HEADS = ("method", "over", "metric", "clients", "gap", "95 % interval", "p", "p, Holm")
ABOUT_GAPS = (
    "Gaps, above 0 better than the method named under over: means over clients of their means over "
    "seeds. Intervals draw clients and seeds anew, 10,000 times; p is Wilcoxon's over clients, "
    "Holm's correction is over the methods. Metrics are never put together."
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """How much better a method is than another, in a family of metrics; above 0 is better.

    `mean` is over the clients' means over seeds, `low` and `high` a 95 % interval of it. `p` is
    Wilcoxon's over clients, `holm` the same corrected for all methods of the comparison.
    """

    method: str
    over: str
    family: str
    clients: int
    mean: float
    low: float
    high: float
    p: float
    holm: float


def gap_matrix(rows: Sequence[Row], at: int, over: int, *, sign: int = 1) -> Floats:
    """Gaps of two columns, (clients, seeds), of those clients that both have."""
    both = [(row.scores[at], row.scores[over]) for row in rows]
    gaps = [np.subtract(a, b) for a, b in both if a and len(a) == len(b)]
    return sign * np.array(gaps, dtype=np.float64) if gaps else np.empty((0, 0))


def p_value(gaps: Sequence[float] | Floats) -> float:
    """Wilcoxon's signed-rank test of one gap per client, two-sided; 1 where nothing differs.

    Clients without a gap are left out. The least that n others can give is 2 / 2^n: 0.03 of six.
    """
    values = np.round(np.asarray(gaps, dtype=np.float64), _DIGITS)
    values = values[values != 0]
    if not len(values):
        return 1.0
    if len(values) > _EXACT:
        return float(wilcoxon(values).pvalue)
    # Counted here, since SciPy takes the normal distribution for more than 13 clients of whom two
    # have equal gaps, and then finds differences where there are none.
    ranks = (2 * rankdata(np.abs(values))).astype(np.int64)  # whole numbers, also where shared
    ways = np.zeros(ranks.sum() + 1)  # how many of all choices of signs come to a sum of ranks
    ways[0] = 1.0
    for rank in ranks:
        ways[rank:] += ways[:-rank].copy()
    reached = ranks[values > 0].sum()
    tail = min(ways[: reached + 1].sum(), ways[reached:].sum())
    return float(min(1.0, 2.0 * tail / ways.sum()))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values, in their order; each at most 1."""
    corrected = [1.0] * len(values)
    largest = 0.0
    for place, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        largest = max(largest, min(1.0, (len(values) - place) * values[at]))
        corrected[at] = largest
    return corrected


def interval(gaps: Floats, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean gap, clients and seeds both drawn anew; gaps (clients, seeds).

    A draw takes as many clients and as many seeds as there are, with replacement, and the mean over
    what they share: all clients of a seed had the same first values. With few clients or seeds such
    an interval is somewhat too narrow; of a single seed it says nothing of the spread over seeds.
    """
    clients, seeds = gaps.shape
    stream = np.random.default_rng(seed)
    of_clients = stream.multinomial(clients, np.full(clients, 1 / clients), draws) / clients
    of_seeds = stream.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    means = ((of_clients @ gaps) * of_seeds).sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Clients by the metric that their scores are."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.metric, []).append(row)
    return groups


def gaps_over(table: Table, over: str) -> list[Gap]:
    """The gaps of all other methods to one, family by family; Holm's correction is per family."""
    sign, base = -1 if table.of_losses else 1, table.columns.index(over)
    over_all: list[Gap] = []
    for family, rows in families(table.clients).items():
        matrices = {
            at: gap_matrix(rows, at, base, sign=sign)
            for at in range(len(table.columns))
            if at != base
        }
        matrices = {at: matrix for at, matrix in matrices.items() if matrix.size}
        values = [p_value(matrix.mean(1)) for matrix in matrices.values()]
        corrected = holm(values)
        for (at, matrix), p, after in zip(matrices.items(), values, corrected, strict=True):
            low, high = interval(matrix)
            mean = float(matrix.mean())
            name = table.columns[at]
            over_all.append(Gap(name, over, family, len(matrix), mean, low, high, p, after))
    return over_all


def told_apart(rows: Sequence[Row], best: int, others: Sequence[int], *, sign: int) -> bool:
    """Whether one column is told from all others: in every family of metrics that can tell.

    Holm's correction is over the others. A family of fewer than six clients cannot tell; but there
    has to be one that can, and none may point the other way. Columns need all of the clients.
    """
    able = 0
    for members in families(rows).values():
        gaps = [gap_matrix(members, best, other, sign=sign) for other in others]
        if any(len(gap) < len(members) for gap in gaps):
            return False
        means = [gap.mean(1) for gap in gaps]
        if any(mean.mean() < 0 for mean in means):
            return False
        if 2.0 ** (1 - len(members)) < SIGNIFICANT:
            able += 1
            if max(holm([p_value(mean) for mean in means])) >= SIGNIFICANT:
                return False
    return able > 0


def gaps_markdown(gaps: Sequence[Gap]) -> str:
    """The gaps as Markdown."""
    return markdown(GAP_HEADS, map(gap_cells, gaps), left=(0, 1, 2))


def shown_gaps(gaps: Sequence[Gap]) -> str:
    """Gaps of one method to one other with their intervals, metric by metric, in a cell."""
    several = len(gaps) > 1
    shown = [(f"{gap.family} " if several else "", *gap_cells(gap)[4:6]) for gap in gaps]
    return "; ".join(f"{family}{mean} ({between})" for family, mean, between in shown) or "–"


def gap_cells(gap: Gap) -> list[str]:
    """A gap in the order of GAP_HEADS."""
    digits = 3 if gap.family == "loss" else 1
    return [
        gap.method,
        gap.over,
        gap.family,
        str(gap.clients),
        f"{gap.mean:+.{digits}f}",
        f"{gap.low:+.{digits}f} to {gap.high:+.{digits}f}",
        f"{gap.p:.3f}",
        f"{gap.holm:.3f}",
    ]


def gaps_csv(gaps: Sequence[Gap]) -> str:
    """A line for every gap, nothing rounded."""
    return csv_text((column.name for column in fields(Gap)), map(astuple, gaps))
