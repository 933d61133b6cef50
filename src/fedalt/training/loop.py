"""The one training loop: AdamW on the tensors that an order names, everything else frozen."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalt import tree as trees
from fedalt.adapters.layer import Noise
from fedalt.data.examples import Example
from fedalt.models import Base
from fedalt.seeds import generator, seed_of
from fedalt.training.batches import collate, epoch_order
from fedalt.training.loss import client_means, token_losses
from fedalt.training.orders import Fit, Moments
from fedalt.tree import Name, Tree

OnStep = Callable[[int, int, float], None]


class TrainingError(ValueError):
    """Training that cannot go on, what was tried, and what to change."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a client trains; the defaults are those of the FedALT code.

    The learning rate falls linearly to 0 within a round. `carry_optimizer` keeps AdamW's moments
    from round to round, which is a different algorithm from the published ones.
    """

    lr: float = 3e-4
    batch_size: int = 8
    local_epochs: int = 1
    weight_decay: float = 0.05
    clip: float = 1.0
    carry_optimizer: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("local_epochs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, but it is at least {least}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}, but it must be above 0")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}, but it cannot be negative")


@dataclass(frozen=True)
class Trained:
    """The outcome of a fit: the whole tree on the CPU, and the mean loss over its steps."""

    tree: Tree
    moments: Moments
    loss: float
    steps: int
    tokens: int


def train(
    base: Base,
    order: Fit,
    examples: Sequence[Example],
    training: Training,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> Trained:
    """Carry out an order on one client's examples.

    Same seed, same result: the order of the examples and the dropout masks depend on nothing else.
    `on_step` hears the number of steps done, of all steps, and the step's loss.
    """
    tree = trees.copy(trees.on(order.tree, base.adapted.device))
    names = sorted(order.train)
    for name in names:
        tree[name].requires_grad_()
    descending = sorted(order.descending)
    tensors = [tree[name] for name in descending]
    optimizer = torch.optim.AdamW(
        tensors, lr=training.lr * order.rate, weight_decay=training.weight_decay, fused=True
    )
    if order.moments is not None and order.moments.steps:
        _restore(optimizer, tree, descending, order.moments)
    batches = _batches(examples, training, order.epochs, seed)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    total, tokens = 0.0, 0
    # A step of its own may bind several trees before it goes back: a layer that runs again then
    # would meet the wrong one.
    with _checkpointing(base, training.gradient_checkpointing and order.step is None):
        for done in range(steps):
            ahead = [(done + which) % steps for which in (0, 1)]
            pair = [(batches[at], Noise((seed_of(seed, "noise", at),))) for at in ahead]
            loss = float(_step(base, order, tree, names, pair))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} after {done} of {steps} steps; "
                    f"a lower learning rate than {training.lr} may help"
                )
            torch.nn.utils.clip_grad_norm_(tensors, training.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss
            tokens += sum(len(example.ids) for example in batches[done])
            if on_step is not None:
                on_step(done + 1, steps, loss)
    return Trained(
        trees.on(trees.copy(tree), "cpu"),
        Moments() if order.moments is None else _moments(optimizer, tree, descending),
        total / max(steps, 1),
        steps,
        tokens,
    )


def _batches(
    examples: Sequence[Example], training: Training, epochs: int | None, seed: int
) -> list[list[Example]]:
    """The examples of every step."""
    lengths = [len(example.ids) for example in examples]
    return [
        [examples[index] for index in indices]
        for epoch in range(training.local_epochs if epochs is None else epochs)
        for indices in epoch_order(lengths, training.batch_size, generator(seed, "order", epoch))
    ]


def _step(
    base: Base,
    order: Fit,
    tree: Tree,
    names: list[Name],
    pair: Sequence[tuple[list[Example], Noise]],
) -> Tensor:
    """Loss of one batch, its gradients left on the tree's tensors."""

    def loss_of(tree: Tree, which: int) -> Tensor:
        chosen, noise = pair[which]
        batch = collate([chosen], base.pad_id, base.adapted.device)
        # Bound until the backward pass is over: a checkpointed layer runs once more in it.
        model = bindings.enter_context(base.adapted.bound(order.plan, order.compose(tree), noise))
        loss = client_means(token_losses(model, batch), batch, clients=1).sum()
        return loss if order.penalty is None else loss + order.penalty(tree)

    try:
        with ExitStack() as bindings:
            if order.step is None:
                loss = loss_of(tree, 0)
                loss.backward()
                return loss.detach()
            stepped = order.step(tree, names, loss_of)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        chosen = pair[0][0]
        longest = max(len(example.ids) for example in chosen)
        raise TrainingError(
            f"out of memory on {base.adapted.device} with a batch of {len(chosen)} examples of up "
            f"to {longest} tokens; lower --batch-size or --max-length, or set "
            "--gradient-checkpointing"
        ) from error
    for name, gradient in stepped.gradients.items():
        # Laid out like the tensor itself: the fused AdamW reads both as if they were.
        tree[name].grad = gradient.detach().contiguous()
    with torch.no_grad():
        for name, moved in stepped.moved.items():
            tree[name].copy_(moved)
    return stepped.loss.detach()


@contextmanager
def _checkpointing(base: Base, wanted: bool) -> Iterator[None]:
    """Keep only each block's input for the backward pass and run the block again there."""
    if not wanted:
        yield
        return
    model = base.adapted.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode only; the base's dropout is 0
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; the CPU's allocator has no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _moments(optimizer: torch.optim.AdamW, tree: Tree, names: list[Name]) -> Moments:
    states = {name: optimizer.state[tree[name]] for name in names}
    if not all(states.values()):
        return Moments()
    return Moments(
        trees.copy({name: state["exp_avg"].cpu() for name, state in states.items()}),
        trees.copy({name: state["exp_avg_sq"].cpu() for name, state in states.items()}),
        int(next(iter(states.values()))["step"]) if states else 0,
    )


def _restore(optimizer: torch.optim.AdamW, tree: Tree, names: list[Name], moments: Moments) -> None:
    trees.require_same_names(moments.first, names, "the carried optimiser state")
    for name in names:
        optimizer.state[tree[name]] = {
            "exp_avg": moments.first[name].to(tree[name].device).clone(),
            "exp_avg_sq": moments.second[name].to(tree[name].device).clone(),
            "step": torch.tensor(float(moments.steps)),
        }
