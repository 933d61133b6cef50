"""What all methods share: the size of their adapters, and how much a client counts in a mean."""

from dataclasses import dataclass
from typing import Literal

from fedalt.adapters.plan import Slot
from fedalt.training.orders import Fitted

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class Lora:
    """Rank, alpha and input dropout of every adapter of a run; defaults of the FedALT code."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}, but a low-rank pair has at least rank 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}, but it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, but it is at least 0 and below 1")

    def slot(self, name: str) -> Slot:
        """A slot of this size."""
        return Slot(name, self.rank, self.alpha)


def weight_of(fitted: Fitted, weighting: Weighting) -> float:
    """A client's weight in a mean: 1, or how many training examples it has."""
    return 1.0 if weighting == "uniform" else float(fitted.examples)
