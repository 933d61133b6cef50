"""A clip that follows a quantile of what clients would have sent, and what its count costs.

Andrew, Thakkar, McMahan, Ramaswamy: "Differentially Private Learning with Adaptive Clipping", arXiv
1905.03871. With C_t the clip of round t, z the noise multiplier that is accounted for, and b_k = 1
for each of the n clients in a round whose change had a norm of at most C_t, 0 for the others:

    b~      = 1/2 + (sum_k (b_k - 1/2) + N(0, s^2)) / n
    C_(t+1) = C_t exp(-eta (b~ - quantile))                               eta = 0.2, the paper's
    z_sum   = (z^-2 - (2 s)^-2)^(-1/2)       noise of the uploads' sum: z_sum C_t      (Theorem 1)

Sum and count together cost what the sum alone would with z. The paper's s is a twentieth of the
clients in a round. With few clients there is no such z_sum, or a large one: so s is at least what
makes z_sum 1.054 z, which is our choice. A client without data would add nothing to either sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from fedalt.core.noise import Randomness
from fedalt.engine.states import States

WITHIN: Final = "within_clip"  # the metric with which a client says whether its change was

_ETA: Final = 0.2
_LEAST_SHARE: Final = 0.1  # of the budget of a round at most, for the count, with few clients
_STATE: Final = "clip"


@dataclass(frozen=True)
class Clip:
    """The largest norm of a client's change in the next round."""

    TAG: ClassVar = "privacy/clip"

    norm: float


@dataclass(frozen=True)
class AdaptiveClip:
    """The clip of one round, `norm`, and how the next one follows from it.

    `quantile` in (0, 1) is the share of changes that shall be within it, `noise` >= 0 is z, and
    `clients` are how many there are in a round at most.
    """

    quantile: float
    norm: float
    noise: float
    clients: int
    randomness: Randomness

    @property
    def count_deviation(self) -> float:
        """The noise of the count, s."""
        if self.noise == 0:
            return 0.0
        return max(self.clients / 20, self.noise / (2 * math.sqrt(_LEAST_SHARE)))

    @property
    def sum_noise(self) -> float:
        """The noise multiplier of the uploads' sum."""
        if self.noise == 0:
            return 0.0
        return 1 / math.sqrt(self.noise**-2 - (2 * self.count_deviation) ** -2)

    def following(self, within: Sequence[bool]) -> Clip:
        """The next round's clip, of whether each accepted change was within this one."""
        noise = self.count_deviation * float(self.randomness.normal(1))
        centred = sum(1 / 2 if inside else -1 / 2 for inside in within)
        share = 1 / 2 + (centred + noise) / max(len(within), 1)
        return Clip(self.norm * math.exp(-_ETA * (share - self.quantile)))

    def settle(self, states: States, within: Sequence[bool]) -> None:
        """Keep the next round's clip, which counts once the round does."""
        states.put(_STATE, self.following(within))


def clip_now(states: States) -> float | None:
    """The clip that earlier rounds have come to; None before the first one is over."""
    kept = states.get(_STATE, Clip)
    return None if kept is None else kept.norm
