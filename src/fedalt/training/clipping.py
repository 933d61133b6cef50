"""DP-SGD: every text's gradient is clipped by itself, and noise is added to their sum.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang: "Deep Learning with Differential Privacy",
arXiv 1607.00133. A step of a client with n texts and batches of B takes each text with probability
q = B/n and descends on

    1/B ( sum_i g_i min(1, clip/|g_i|) + noise clip z ),    z normal, g_i of a text's mean loss

over all tensors that train, a mixer, a router and a head included. To the model every text is a
client of its own: what tells clients apart in a fused pass gives each text's gradient as well.
Where clients cannot share a pass, each text has one to itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalt.core.noise import Randomness
from fedalt.core.tree import Name, Tree
from fedalt.data.examples import Example
from fedalt.training.batches import steps_per_epoch
from fedalt.training.orders import Fit

# The losses of some of the texts, (texts,), by a tree with a row for each of them.
Losses = Callable[[Tree, slice], Tensor]


@dataclass(frozen=True)
class Clipping:
    """How one client trains: the largest norm of a text's gradient, noise in multiples of it."""

    clip: float
    noise: float
    randomness: Randomness

    def batches(
        self, examples: Sequence[Example], batch_size: int, epochs: int
    ) -> list[list[Example]]:
        """As many batches as without privacy; each text is in each with probability `rate`."""
        steps = epochs * steps_per_epoch(len(examples), batch_size)
        drawn = rate(len(examples), batch_size)
        return [
            [examples[at] for at in self.randomness.sample(len(examples), drawn)]
            for _ in range(steps)
        ]


def require_clippable(order: Fit) -> None:
    """Raise ValueError for training in which a single text's part has no gradient of its own."""
    if order.step is not None or order.penalty is not None:
        what = "a step of its own" if order.step is not None else "a penalty"
        raise ValueError(
            f'unit = "example" in [privacy] clips the gradient of each text, but this method\'s '
            f'training has {what} beside it; unit = "client" does without'
        )


def rate(examples: int, batch_size: int) -> float:
    """The probability with which a text is in a batch."""
    return min(1.0, batch_size / examples)


def text_gradients(
    tree: Tree, names: Sequence[Name], owners: Tensor, losses: Losses, together: bool
) -> tuple[Tree, Tensor]:
    """Each text's gradient of its own loss, (texts, ...) each, and the losses, (texts,).

    `tree` is (clients, ...), `owners` (texts,) says whose a text is. All texts go through the model
    `together`, or one by one.
    """
    size = len(owners) if together else 1
    parts = []
    for start in range(0, len(owners), size):
        texts = slice(start, start + size)
        rows = {name: tensor.detach()[owners[texts]] for name, tensor in tree.items()}
        leaves = [rows[name].requires_grad_() for name in names]
        of_texts = losses(rows, texts)
        # Before the next text is bound: a checkpointed layer runs once more in here.
        found = torch.autograd.grad(of_texts.sum(), leaves, materialize_grads=True)
        parts.append((of_texts.detach(), *found))
    of_all, *gradients = (
        each[0] if together else torch.cat(each) for each in zip(*parts, strict=True)
    )
    return dict(zip(names, gradients, strict=True)), of_all


def clipped_sum(gradients: Tree, owners: Tensor, clips: Tensor) -> Tree:
    """The sum of each client's gradients, each cut to its client's norm: (clients, ...) each.

    `clips` (clients,) are the largest norms.
    """
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = (clips.to(norms)[owners] / norms.clamp(min=1e-30)).clamp(max=1.0)
    return {
        name: gradient.new_zeros(len(clips), *gradient.shape[1:]).index_add_(
            0, owners, gradient * factors.view(-1, *[1] * (gradient.dim() - 1))
        )
        for name, gradient in gradients.items()
    }


def noised_mean(summed: Tree, clippings: Sequence[Clipping], sizes: Sequence[int]) -> Tree:
    """The sums with noise, over the sizes that batches have in the mean."""
    out = {name: torch.empty_like(tensor) for name, tensor in summed.items()}
    for at, (clipping, size) in enumerate(zip(clippings, sizes, strict=True)):
        for name, tensor in summed.items():
            noise = clipping.randomness.normal(tensor[at].numel()) * clipping.noise * clipping.clip
            out[name][at] = (tensor[at] + noise.view(tensor.shape[1:]).to(tensor)) / size
    return out


def private_gradients(
    tree: Tree,
    names: Sequence[Name],
    owners: Tensor,
    clippings: Sequence[Clipping],
    sizes: Sequence[int],
    losses: Losses,
    *,
    together: bool = True,
) -> tuple[Tree, Tensor]:
    """What each client descends on, (clients, ...) each, and the losses of all texts, (texts,).

    See `text_gradients` for `together`.
    """
    summed = {name: torch.zeros_like(tree[name]) for name in names}
    of_texts = owners.new_empty(0, dtype=torch.float32)
    if len(owners):  # no client has drawn a text: noise alone
        gradients, of_texts = text_gradients(tree, names, owners, losses, together)
        clips = torch.tensor([clipping.clip for clipping in clippings])
        summed = clipped_sum(gradients, owners, clips)
    with torch.no_grad():
        return noised_mean(summed, clippings, sizes), of_texts
