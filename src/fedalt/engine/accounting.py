"""What has been spent of privacy, and how much noise a budget asks for; by `dp-accounting`.

unit = "client"    A client's part in n rounds is n Gaussian mechanisms, which are one of deviation
                   noise / sqrt(n): epsilon is exact (Balle and Wang, arXiv 1805.06530). Neighbours
                   differ in whether one client has data: without, it takes part and changes
                   nothing. Who is in a cohort follows from the run's seed, which all know: no
                   amplification by sampling is claimed.
unit = "example"   Poisson sampling with a secret generator; Renyi accounting (Mironov, Talwar,
                   Zhang, arXiv 1908.10530). Neighbours differ in one example, added or removed.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

Spent = Mapping[float, int]  # how many noisy sums, by the probability to be in one

_LARGEST: Final = 1e6  # of a noise multiplier
_ORDERS: Final = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)


def require_accounting() -> None:
    """Raise ValueError without the package that counts."""
    if find_spec("dp_accounting") is None:
        raise ValueError("dp-accounting is not installed: `pip install 'fedalt[privacy]'`")


def epsilon(spent: Spent, noise: float, delta: float) -> float:
    """What is spent with this noise multiplier; infinite without noise."""
    return _epsilon(
        tuple(sorted((rate, count) for rate, count in spent.items() if count)), noise, delta
    )


@cache
def _epsilon(spent: Sequence[tuple[float, int]], noise: float, delta: float) -> float:
    if not spent:
        return 0.0
    if noise == 0:
        return math.inf
    import dp_accounting as dp

    if all(rate >= 1 for rate, _ in spent):
        rounds = sum(count for _, count in spent)
        return float(dp.get_epsilon_gaussian(noise / math.sqrt(rounds), delta))
    accountant: Any = dp.rdp.RdpAccountant(_ORDERS)
    for rate, count in spent:
        accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta))


def noise_for(spent: Spent, budget: float, delta: float) -> float:
    """The least noise multiplier, to a thousandth, with which that does not exceed the budget."""
    if not any(spent.values()):
        return 0.0
    low, high = 0.0, 1.0
    while epsilon(spent, high, delta) > budget:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise ValueError(f"no noise keeps epsilon at {budget:g} with delta = {delta:g}")
    while high - low > high / 1000:
        middle = (low + high) / 2
        if middle > 0 and epsilon(spent, middle, delta) <= budget:
            high = middle
        else:
            low = middle
    return high
