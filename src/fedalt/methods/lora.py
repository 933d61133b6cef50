"""What all methods share: the size of their adapters, and how much a client counts in a mean."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedalt.methods.checks import check

if TYPE_CHECKING:
    from fedalt.adapters.plan import Plan, Slot
    from fedalt.training.orders import Fitted

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class Lora:
    """Rank, alpha and input dropout of every adapter of a run; defaults of the FedALT code."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        check(self, rank="[1, inf)", alpha="(0, inf)", dropout="[0, 1)")

    def slot(self, name: str) -> "Slot":
        """A slot of this size."""
        from fedalt.adapters.plan import Slot  # brings torch, which settings do without

        return Slot(name, self.rank, self.alpha)

    def plan(self, slot: str) -> "Plan":
        """Plain LoRA: one slot of this size."""
        from fedalt.adapters.plan import single

        return single(self.slot(slot), self.dropout)


def weight_of(fitted: "Fitted", weighting: Weighting) -> float:
    """A client's weight in a mean: 1, or how many training examples it has."""
    return 1.0 if weighting == "uniform" else float(fitted.examples)
