"""A client's whole model as one plain adapter, which every tool for LoRA reads.

Slots side by side are one slot of the sum of their ranks. That is exact where their weights are
fixed numbers. A mixer or router weighs them anew for every token; in its place stands what it does
on average at each site, and what that costs is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedalt.adapters.plan import HEAD, Plan, Similarity, Slot, Sum, single
from fedalt.core import tree as trees
from fedalt.core.settings import Scoring
from fedalt.core.tree import Name, Tree
from fedalt.data.examples import Example
from fedalt.evaluation.scoring import score_together
from fedalt.methods.contract import Serving
from fedalt.models.base import Base


@dataclass(frozen=True)
class Fixed:
    """One slot that does what all of them do.

    `losses` are those of the model with its mixer or router, and of this one, in nats a token; None
    where nothing differs. They are `measured_on` examples that the weights do not come from, or on
    those that they do come from where there are no others.
    """

    serving: Serving
    losses: tuple[float, float] | None = None
    measured_on: str = ""

    @property
    def note(self) -> str:
        """A sentence for the user, "" where nothing differs."""
        if self.losses is None:
            return ""
        before, after = self.losses
        return (
            "the weights of the adapters, which differ from token to token, are replaced by their "
            f"mean at each site: a loss of {after:.3f} nats a token instead of {before:.3f} on the "
            f"client's {self.measured_on} ({after - before:+.3f})"
        )


def with_fixed_weights(
    serving: Serving, base: Base, known: Sequence[Example], held_out: Sequence[Example]
) -> Fixed:
    """The serving as one slot; mean weights come from the `known` examples.

    What that costs is measured on the `held_out` ones, or on the known where there are none. Raises
    ValueError for weights that depend on the prompt, and where examples are needed and there are
    none.
    """
    plan = serving.plan
    if isinstance(plan.combine, Similarity):
        raise ValueError(
            "this client weighs its adapters anew for every prompt, which no folder can hold; "
            "--format individual writes its own adapter, --column shared the shared part"
        )
    if isinstance(plan.combine, Sum):
        return Fixed(_stacked(serving, dict.fromkeys(base.adapted.sites, plan.combine.weights)))
    if not known:
        raise ValueError(
            "the mean weights of the adapters come from the client's training examples, but it has "
            "none; --format fedalt writes the whole model without them"
        )
    losses = Scoring(generate=False)
    (seen,) = score_together(base, [(serving, known)], losses, watch=len(known))
    weights = {} if seen.weighing is None else seen.weighing.weights
    if unseen := base.adapted.sites.keys() - weights.keys():
        raise ValueError(
            f"{min(unseen)} does not see all tokens, so the mean weights of its adapters are not "
            "known; --format fedalt writes the mixer too"
        )
    fixed = _stacked(serving, weights)
    before, after = (
        score_together(base, [(each, held_out or known)], losses)[0].metrics["loss"]
        for each in (serving, fixed)
    )
    without = "training examples, as it has none for validation"
    return Fixed(fixed, (before, after), "validation examples" if held_out else without)


def _stacked(serving: Serving, weights: "dict[str, tuple[float, ...]]") -> Serving:
    """One slot whose B holds the weights of each site."""
    slots = serving.plan.slots
    rank = sum(slot.rank for slot in slots)
    plan: Plan = single(Slot("all", rank, float(rank)), serving.plan.dropout)
    tree: Tree = dict(trees.select(serving.tree, HEAD))
    for site, of_site in weights.items():
        pairs = list(zip(slots, of_site, strict=True))
        a = [serving.tree[Name(site, slot.name, "A")] for slot in slots]
        b = [serving.tree[Name(site, slot.name, "B")] * (slot.scaling * w) for slot, w in pairs]
        tree[Name(site, "all", "A")] = torch.cat(a)
        tree[Name(site, "all", "B")] = torch.cat(b, 1)
    return Serving(plan, tree)
