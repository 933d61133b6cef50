"""The one training loop: AdamW on the tensors that an order names, everything else frozen."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedalt import tree as trees
from fedalt.adapters.layer import Noise
from fedalt.adapters.plan import Plan
from fedalt.data.examples import Example
from fedalt.models import Base
from fedalt.seeds import generator, seed_of
from fedalt.training.batches import collate, epoch_order, steps_per_epoch
from fedalt.training.loss import client_means, token_losses
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
class Moments:
    """AdamW's running means, so that a later round can go on with them."""

    first: Tree = field(default_factory=dict)
    second: Tree = field(default_factory=dict)
    steps: int = 0


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
    plan: Plan,
    start: Tree,
    wanted: frozenset[Name],
    examples: Sequence[Example],
    training: Training,
    *,
    epochs: int,
    seed: int,
    moments: Moments | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Train the wanted tensors of a tree on one client's examples.

    Same seed, same result: the order of the examples and the dropout masks depend on nothing else.
    `on_step` hears the number of steps done, of all steps, and the step's loss.
    """
    device = base.adapted.device
    tree = trees.copy(trees.on(start, device))
    tensors = [tree[name].requires_grad_() for name in sorted(wanted)]
    optimizer = torch.optim.AdamW(
        tensors, lr=training.lr, weight_decay=training.weight_decay, fused=True
    )
    if moments is not None and moments.steps:
        _restore(optimizer, tree, sorted(wanted), moments)
    steps = epochs * steps_per_epoch(len(examples), training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    lengths = [len(example.ids) for example in examples]
    batches = (
        [examples[index] for index in indices]
        for epoch in range(epochs)
        for indices in epoch_order(lengths, training.batch_size, generator(seed, "order", epoch))
    )
    done, total, tokens = 0, 0.0, 0
    with _checkpointing(base, training.gradient_checkpointing):
        for chosen in batches:
            loss = float(_step(base, plan, tree, chosen, Noise((seed_of(seed, "noise", done),))))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} after {done} of {steps} steps; "
                    f"a lower learning rate than {training.lr} may help"
                )
            torch.nn.utils.clip_grad_norm_(tensors, training.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            total += loss
            tokens += sum(len(example.ids) for example in chosen)
            if on_step is not None:
                on_step(done, steps, loss)
    return Trained(
        trees.on(trees.copy(tree), "cpu"),
        _moments(optimizer, tree, sorted(wanted)) if training.carry_optimizer else Moments(),
        total / max(done, 1),
        done,
        tokens,
    )


def _step(base: Base, plan: Plan, tree: Tree, chosen: list[Example], noise: Noise) -> Tensor:
    """Loss of one batch, its gradients left on the tree's tensors."""
    try:
        batch = collate([chosen], base.pad_id, base.adapted.device)
        with base.adapted.bound(plan, tree, noise) as model:
            loss = client_means(token_losses(model, batch), batch, clients=1).sum()
            loss.backward()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        longest = max(len(example.ids) for example in chosen)
        raise TrainingError(
            f"out of memory on {base.adapted.device} with a batch of {len(chosen)} examples of up "
            f"to {longest} tokens; lower --batch-size or --max-length, or set "
            "--gradient-checkpointing"
        ) from error
    return loss.detach()


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
