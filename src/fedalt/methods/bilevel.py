"""A training step on two levels: one adapter follows another, which learns to be followed.

With x above and y below, on a batch and on the next one:

    y+ = y - a grad_y f(x, y; batch)
    h  = grad_x f(x, y+; next) - [d2 f / dx dy](x, y; batch) a grad_y f(x, y+; next)

y moves to y+, and h is the gradient of x. The product with the second derivative is
grad_x <grad_y f(x, y), v> with v = a grad_y f(x, y+) held fixed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedalt.core.tree import Name, Tree
from fedalt.training.orders import Stepped

Gradient = Literal["exact", "finite_difference", "first_order"]


@dataclass(frozen=True)
class Unrolled:
    """One step on both levels: slot `moves` moves by itself, all else gets a hypergradient.

    `rate` is the lower level's learning rate, of A and of B times `scaling`, which is the s of that
    slot: descent on A and s B, whose product is all that a layer sees.
    "exact" differentiates twice, which fused attention kernels cannot; "finite_difference" takes
    the difference of two first derivatives instead; "first_order" leaves the second term out.
    """

    moves: str
    rate: float
    gradient: Gradient
    scaling: float = 1.0

    def __call__(
        self, tree: Tree, train: Sequence[Name], loss: Callable[[Tree, int], Tensor]
    ) -> Stepped:
        """Two forward and backward passes; "exact" goes back twice, differences pass four times."""
        lower = [name for name in train if name.slot == self.moves]
        upper = [name for name in train if name.slot != self.moves]
        exact = self.gradient == "exact"
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            first = loss(tree, 0)
        slope = _gradients(first, tree, lower, keep=exact)
        rates = {name: self._rate(name) for name in lower}
        moved = {name: (tree[name] - rates[name] * slope[name]).detach() for name in lower}
        for tensor in moved.values():
            tensor.requires_grad_()
        after = {**tree, **moved}
        both = _gradients(loss(after, 1), after, [*upper, *lower])
        h = {name: both[name] for name in upper}
        v = {name: rates[name] * both[name].detach() for name in lower}
        if exact:
            along = torch.stack([(slope[name] * v[name]).sum() for name in lower]).sum()
            crossed = _gradients(along, tree, upper)
        elif self.gradient == "finite_difference":
            crossed = self._difference(tree, upper, v, loss)
        else:
            return Stepped(first.detach(), h, moved)
        return Stepped(first.detach(), {n: h[n] - crossed[n] for n in upper}, moved)

    def _rate(self, name: Name) -> float:
        """What a gradient is multiplied with; that of B holds one s, and B's effect another."""
        return self.rate / self.scaling**2 if name.factor == "B" else self.rate

    def _difference(
        self, tree: Tree, upper: Sequence[Name], v: Tree, loss: Callable[[Tree, int], Tensor]
    ) -> Tree:
        """(grad_x f(x, y + e v) - grad_x f(x, y - e v)) / 2e, e so small that e v is 0.01 long."""
        length = torch.stack([tensor.square().sum() for tensor in v.values()]).sum().sqrt()
        if not length:
            return {name: torch.zeros_like(tree[name]) for name in upper}
        e = 0.01 / length
        ahead, behind = (
            _gradients(
                loss({**tree, **{n: (tree[n] + sign * e * v[n]).detach() for n in v}}, 0),
                tree,
                upper,
            )
            for sign in (1, -1)
        )
        return {name: (ahead[name] - behind[name]) / (2 * e) for name in upper}


def _gradients(value: Tensor, tree: Tree, names: Sequence[Name], *, keep: bool = False) -> Tree:
    """The gradient for every name; 0 where the value does not depend on it."""
    tensors = [tree[name] for name in names]
    gradients = torch.autograd.grad(
        value, tensors, create_graph=keep, retain_graph=True, materialize_grads=True
    )
    return dict(zip(names, gradients, strict=True))
