"""What the right guesses of one training run say of its epsilon: a lower bound.

Steinke, Nasr, Jagielski: "Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv
2305.08846. Each of m canaries is in the training data if a fair coin says so. Whoever sees what
training releases guesses r of the coins, keeps silent about the others, and is right v times.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom

CONFIDENCE: Final = 0.95
_PARTS: Final = (8, 4, 2, 1)  # of the canaries, one in so many is guessed
_LARGEST: Final = 50.0  # what few guesses could show at most is far below


@dataclass(frozen=True)
class Guesses:
    """How many coins were guessed of how many canaries, how many rightly, and what that shows.

    `bound` is the least epsilon that is consistent with it, 0 where it shows nothing.
    """

    canaries: int
    made: int
    right: int
    bound: float


def probability(canaries: int, made: int, right: int, epsilon: float, delta: float) -> float:
    """The most that (epsilon, delta) allows to the chance of so many right guesses, or more.

    Theorem 5.2 of the paper: with W binomial of `made` and e^epsilon / (1 + e^epsilon), and m
    canaries,

        P[right] <= P[W >= right] + 2 m delta max_i P[right - i <= W < right] / i,  i = 1..right
    """
    if not 0 <= right <= made <= canaries:
        raise ValueError(f"{right} right of {made} guesses about {canaries} canaries is no count")
    accuracy = 1 / (1 + math.exp(-epsilon))
    pure = float(binom.sf(right - 1, made, accuracy))
    if not right:
        return 1.0
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), made, accuracy))
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(1.0, pure + 2 * canaries * delta * steepest)


def lower_bound(
    canaries: int, made: int, right: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The epsilon below which so many right guesses had a chance of less than 1 - `confidence`."""

    def surplus(epsilon: float) -> float:
        return probability(canaries, made, right, epsilon, delta) - (1 - confidence)

    if surplus(0.0) >= 0:
        return 0.0
    if surplus(_LARGEST) < 0:
        return _LARGEST
    return float(brentq(surplus, 0.0, _LARGEST, xtol=1e-6))


def guess(signs: Sequence[float], coins: Sequence[bool], delta: float) -> Guesses:
    """Guess the coins of the canaries with the largest and the smallest signs of training.

    How many are guessed is tried in four ways, at a fourth of the error each, so that the best
    bound of the four holds with the confidence of one.
    """
    order, truth = np.argsort(signs, kind="stable"), np.array(coins)
    confidence = 1 - (1 - CONFIDENCE) / len(_PARTS)
    tried = []
    for part in _PARTS:
        half = len(signs) // part // 2
        right = _right(truth, order, half)
        bound = lower_bound(len(signs), 2 * half, right, delta, confidence)
        tried.append(Guesses(len(signs), 2 * half, right, bound))
    return max(tried, key=lambda guesses: guesses.bound)


def _right(truth: NDArray[np.bool_], order: NDArray[np.intp], half: int) -> int:
    """How many are right if `half` at either end of the order are guessed."""
    return int((~truth[order[:half]]).sum() + truth[order[len(order) - half :]].sum())
