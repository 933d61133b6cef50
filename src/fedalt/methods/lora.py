"""What all methods share: the size of their adapters, and how much a client counts in a mean."""

from typing import TYPE_CHECKING, Annotated, Literal

from fedalt.core.declared import declared, setting

if TYPE_CHECKING:
    from fedalt.adapters.plan import Plan, Slot
    from fedalt.training.orders import Fitted

Weighting = Literal["uniform", "examples"]


@declared
class Lora:
    """The size of every adapter of a run; defaults of the FedALT code."""

    rank: Annotated[int, setting("Rank of the adapters.", ge=1)] = 8
    alpha: Annotated[
        float, setting("The output of an adapter is scaled by alpha / rank.", gt=0)
    ] = 32.0
    dropout: Annotated[float, setting("Dropout of the input of the adapters.", ge=0, lt=1)] = 0.05

    def slot(self, name: str) -> "Slot":
        """A slot of this size."""
        from fedalt.adapters.plan import Slot  # brings torch, which settings do without

        return Slot(name, self.rank, self.alpha)

    def plan(self, *slots: str) -> "Plan":
        """Plain LoRA: one slot of this size, or the sum of several."""
        from fedalt.adapters.plan import Plan, Sum

        return Plan(tuple(map(self.slot, slots)), Sum((1.0,) * len(slots)), self.dropout)


def weight_of(fitted: "Fitted", weighting: Weighting) -> float:
    """A client's weight in a mean: 1, or how many training examples it has."""
    return 1.0 if weighting == "uniform" else float(fitted.examples)
