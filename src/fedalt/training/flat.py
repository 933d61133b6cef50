"""What several clients train, side by side in one matrix, and AdamW with a step for each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalt.core.tree import Name, Tree
from fedalt.training.orders import Moments

BETAS, EPS = (0.9, 0.999), 1e-8  # those of torch's AdamW


@dataclass(frozen=True)
class Flat:
    """Values and AdamW's means of C clients, (C, numbers) each, and their steps, (C,).

    `tree` holds the values by name, (C, ...) each: leaves that share the matrix's memory.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    tree: Tree

    @staticmethod
    def of(
        trees: Sequence[Tree], names: Sequence[Name], moments: Sequence[Moments | None]
    ) -> "Flat":
        """The named tensors of every client's tree, and the moments to go on with."""

        def row(tree: Tree) -> Tensor:
            return torch.cat([tree[name].reshape(-1) for name in names])

        value = torch.stack([row(tree) for tree in trees]) if names else torch.empty(len(trees), 0)
        first, second = torch.zeros_like(value), torch.zeros_like(value)
        steps = torch.zeros(len(trees), dtype=torch.float64)
        for at, kept in enumerate(moments):
            if kept is not None and kept.steps:
                first[at], second[at] = row(kept.first), row(kept.second)
                steps[at] = kept.steps
        shapes = {name: tuple(trees[0][name].shape) for name in names}
        return Flat._around(value, first, second, steps, shapes)

    @staticmethod
    def _around(
        value: Tensor,
        first: Tensor,
        second: Tensor,
        steps: Tensor,
        shapes: dict[Name, tuple[int, ...]],
    ) -> "Flat":
        tree: Tree = {}
        begin = 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            here = (slice(None), slice(begin, begin + size))
            tree[name] = value[here].view(-1, *shape).detach().requires_grad_()
            begin += size
        return Flat(value, first, second, steps, tree)

    def only(self, rows: Sequence[int]) -> "Flat":
        """The same for some of the clients, in memory of its own."""
        at = list(rows)
        shapes = {name: tuple(leaf.shape[1:]) for name, leaf in self.tree.items()}
        parts = (self.value[at], self.first[at], self.second[at], self.steps[at])
        return Flat._around(*parts, shapes)

    @torch.no_grad()
    def descend(
        self, gradients: Tree, rates: Sequence[float], weight_decay: float, clip: float
    ) -> None:
        """A step of AdamW for every client: its own rate, its own gradient cut to this norm.

        `gradients` are (C, ...) each. Loshchilov and Hutter, "Decoupled Weight Decay
        Regularization", arXiv 1711.05101, as torch has it.
        """
        b1, b2 = BETAS
        g = torch.cat([gradients[name].flatten(1) for name in self.tree], 1)
        lr = torch.tensor(rates, dtype=torch.float64)
        norms = torch.linalg.vector_norm(g, dim=1)
        g.mul_((clip / (norms + 1e-6)).clamp(max=1.0)[:, None])
        self.steps.add_(1)
        self.first.lerp_(g, 1 - b1)
        self.second.mul_(b2).addcmul_(g, g, value=1 - b2)
        self.value.mul_(self._column(1 - lr * weight_decay))
        root = self.second.sqrt().div_(self._column((1 - b2**self.steps).sqrt())).add_(EPS)
        self.value.sub_(self.first.div(root).mul_(self._column(lr / (1 - b1**self.steps))))

    def _column(self, column: Tensor) -> Tensor:
        """One number for each client, to multiply rows with."""
        return column.to(self.value)[:, None]

    def moments(self, at: int) -> Moments:
        """One client's moments, on the CPU."""
        return Moments(
            self._named(self.first[at]), self._named(self.second[at]), int(self.steps[at])
        )

    def values(self, at: int) -> Tree:
        """One client's tensors, on the CPU."""
        return self._named(self.value[at])

    def _named(self, row: Tensor) -> Tree:
        sizes = [leaf[0].numel() for leaf in self.tree.values()]
        parts = row.detach().cpu().split(sizes)
        return {
            name: part.reshape(leaf.shape[1:]).clone()
            for (name, leaf), part in zip(self.tree.items(), parts, strict=True)
        }
