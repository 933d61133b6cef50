"""Random numbers that nobody can foresee, for noise that protects and for samples that are secret.

They come from the operating system's generator (`os.urandom`), 53 bits a number, and become normal
ones by the inverse of the normal distribution. What `core/seeds.py` draws can be repeated by
everyone who knows the run's seed, and would protect nobody.
"""

import os

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from fedalt.core.seeds import seed_of


class Randomness:
    """A source of random numbers; with a `seed` of one's own they can be repeated, for tests."""

    def __init__(self, seed: int | None = None, *purpose: str | int) -> None:
        self._seeded = None
        if seed is not None:
            self._seeded = np.random.Generator(np.random.Philox(seed_of(seed, *purpose)))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in (0, 1), neither end included."""
        if self._seeded is not None:
            bits = self._seeded.integers(0, 2**64, count, dtype=np.uint64)
        else:
            bits = np.frombuffer(os.urandom(8 * count), np.uint64)
        # The largest of them is rounded up to 1, whose normal number would be infinite.
        inside = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return np.minimum(inside, 1 - 2.0**-53)

    def normal(self, count: int) -> Tensor:
        """Normal numbers of mean 0 and deviation 1, (count,), float64."""
        return torch.from_numpy(ndtri(self.uniform(count)))

    def sample(self, count: int, rate: float) -> list[int]:
        """Which of `count` things are drawn, each with probability `rate`, by itself."""
        return np.flatnonzero(self.uniform(count) < rate).tolist()
