"""Clients in the middle of a fit: their batches, losses and gradients, a step of each at a time."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedalt.core import tree as trees
from fedalt.core.seeds import generator, seed_of
from fedalt.core.settings import Training as Training
from fedalt.core.tree import Name, Tree
from fedalt.data.examples import Example
from fedalt.models.base import Base
from fedalt.training.batches import collate, epoch_order
from fedalt.training.checkpointing import can_checkpoint
from fedalt.training.clipping import Clipping, private_gradients, require_clippable
from fedalt.training.flat import Flat
from fedalt.training.loss import client_means, token_losses
from fedalt.training.orders import Fit, Moments, as_it_is


class TrainingError(ValueError):
    """Training that cannot go on, what was tried, and what to change.

    `which` of the clients that trained together it is about; None: all of them.
    """

    which: int | None = None


@dataclass(frozen=True)
class Share:
    """One client's part of a fit of several: its order, its data, and its own seed.

    With a `clipping` it trains by DP-SGD.
    """

    order: Fit
    examples: Sequence[Example]
    seed: int
    clipping: Clipping | None = None


@dataclass(frozen=True)
class _Row:
    """Texts that share a row of the bound tree, whose order it is, and the seed of its dropout."""

    order: Fit
    texts: Sequence[Example]
    seed: int


@dataclass(frozen=True)
class Trained:
    """The outcome of a fit: the whole tree on the CPU, and the mean loss over its steps.

    `trained` are how many numbers of each slot and factor were trained.
    """

    tree: Tree
    moments: Moments
    loss: float
    steps: int
    tokens: int
    trained: Mapping[tuple[str, str], int] = field(default_factory=dict)


class Client:
    """One client's batches, and what is counted of its steps."""

    def __init__(self, index: int, share: Share, training: Training) -> None:
        self.index, self.order, self.seed = index, share.order, share.seed
        self.clipping, self.expected = share.clipping, min(training.batch_size, len(share.examples))
        self.loss, self.tokens = 0.0, 0
        lengths = [len(example.ids) for example in share.examples]
        epochs = training.local_epochs if share.order.epochs is None else share.order.epochs
        if share.clipping is not None:
            require_clippable(share.order)
            self.batches = share.clipping.batches(share.examples, training.batch_size, epochs)
            return
        self.batches = [
            [share.examples[at] for at in indices]
            for epoch in range(epochs)
            for indices in epoch_order(
                lengths, training.batch_size, generator(share.seed, "order", epoch)
            )
        ]

    def batch(self, at: int) -> list[Example]:
        """The examples of a step; after the last one those of the first."""
        return self.batches[at % len(self.batches)]

    def dropout_seed(self, at: int) -> int:
        """The seed of the dropout masks of a step's batch."""
        return seed_of(self.seed, "noise", at % len(self.batches))

    def took(self, done: int, loss: float, training: Training) -> None:
        """Count a step."""
        if not math.isfinite(loss):
            error = TrainingError(
                f"the loss became {loss} after {done} of {len(self.batches)} steps; "
                f"a lower learning rate than {training.lr} may help"
            )
            error.which = self.index
            raise error
        self.loss += loss
        self.tokens += sum(len(example.ids) for example in self.batches[done])

    def ended(self, tree: Tree, moments: Moments) -> Trained:
        """The outcome."""
        steps = len(self.batches)
        kept = Moments() if self.order.moments is None else moments
        loss, trained = self.loss / max(steps, 1), self.order.trained_numbers
        return Trained(tree, kept, loss, steps, self.tokens, trained)


@dataclass(frozen=True)
class Group:
    """Clients in the middle of a fit: what AdamW moves, and beside it all else, (C, ...) each."""

    base: Base
    training: Training
    clients: Sequence[Client]
    flat: Flat
    beside: Tree

    @staticmethod
    def of(base: Base, shares: Sequence[Share], training: Training) -> "Group":
        """The clients at their first step."""
        device = base.adapted.device
        given = [trees.on(share.order.tree, device) for share in shares]
        order = shares[0].order
        names = sorted(order.descending)
        moments = [_known(share.order.moments, names, device) for share in shares]
        flat = Flat.of(given, names, moments)
        rest = sorted(order.tree.keys() - set(names))
        beside = {name: torch.stack([tree[name] for tree in given]) for name in rest}
        for name in order.train - order.descending:
            beside[name].requires_grad_()
        clients = [Client(at, share, training) for at, share in enumerate(shares)]
        return Group(base, training, clients, flat, beside)

    def only(self, rows: Sequence[int]) -> "Group":
        """Some of the clients."""
        at = list(rows)
        beside = {name: tensor.detach()[at] for name, tensor in self.beside.items()}
        for name, tensor in self.beside.items():
            beside[name].requires_grad_(tensor.requires_grad)
        clients = [self.clients[row] for row in at]
        return Group(self.base, self.training, clients, self.flat.only(at), beside)

    def tree(self, at: int) -> Tree:
        """One client's whole tree, on the CPU."""
        rest = {name: tensor.detach()[at].cpu().clone() for name, tensor in self.beside.items()}
        return {**self.flat.values(at), **rest}

    def descend(self, gradients: Tree, done: int) -> None:
        """A step of AdamW; rates fall linearly."""
        rates = [
            self.training.lr * client.order.rate * (1 - done / len(client.batches))
            for client in self.clients
        ]
        self.flat.descend(gradients, rates, self.training.weight_decay, self.training.clip)

    def step(self, done: int) -> tuple[list[float], Tree]:
        """Each client's loss, and the gradients of what AdamW moves, (C, ...) each."""
        own = self.clients[0].order.step
        whole = {**self.flat.tree, **self.beside}
        try:
            with ExitStack() as bindings:
                if self.clients[0].clipping is not None:
                    return self._clipped(whole, done, bindings)
                if own is None:
                    losses = self._losses(whole, self._rows(done), bindings)
                    names, leaves = list(self.flat.tree), list(self.flat.tree.values())
                    grads = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
                    return losses.detach().tolist(), dict(zip(names, grads, strict=True))
                (client,) = self.clients
                single = {name: tensor[0] for name, tensor in whole.items()}

                def loss_of(tree: Tree, which: int) -> Tensor:
                    stacked = {name: tensor[None] for name, tensor in tree.items()}
                    return self._losses(stacked, self._rows(done + which), bindings)[0]

                stepped = own(single, sorted(client.order.train), loss_of)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(self._too_much(done)) from error
        with torch.no_grad():
            for name, moved in stepped.moved.items():
                self.beside[name].copy_(moved[None])
        gradients = {name: gradient.detach()[None] for name, gradient in stepped.gradients.items()}
        return [float(stepped.loss.detach())], gradients

    def _rows(self, at: int) -> list[_Row]:
        """Each client's batch of a step."""
        return [
            _Row(client.order, client.batch(at), client.dropout_seed(at)) for client in self.clients
        ]

    def _clipped(self, whole: Tree, done: int, bindings: ExitStack) -> tuple[list[float], Tree]:
        """Each client's loss, and the noisy sum of its texts' clipped gradients; see clipping.py.

        A batch without a text has no loss: the mean so far stands for it.
        """
        clippings = [client.clipping for client in self.clients if client.clipping is not None]
        rows = [
            (at, _Row(client.order, [text], seed_of(client.dropout_seed(done), number)))
            for at, client in enumerate(self.clients)
            for number, text in enumerate(client.batch(done))
        ]
        owners = torch.tensor(
            [at for at, _ in rows], dtype=torch.long, device=self.base.adapted.device
        )
        gradients, losses = private_gradients(
            whole,
            list(self.flat.tree),
            owners,
            clippings,
            [client.expected for client in self.clients],
            lambda tree, texts: self._losses(tree, [row for _, row in rows[texts]], bindings),
            together=self.base.adapted.shares_passes,
        )
        means = [client.loss / max(done, 1) for client in self.clients]
        for at in {at for at, _ in rows}:
            means[at] = float(losses[owners == at].mean())
        return means, gradients

    def _losses(self, whole: Tree, rows: Sequence[_Row], bindings: ExitStack) -> Tensor:
        """Mean loss of each row's texts, (rows,), and its penalty; `whole` is (rows, ...).

        The model stays bound until the backward pass is over: a checkpointed layer runs once more
        in it.
        """
        adapted = self.base.adapted
        batches = [row.texts for row in rows]
        pack = all(packs(self.base, batch) for batch in batches)
        batch = collate(batches, self.base.pad_id, adapted.device, pack=pack)
        dropout = tuple(row.seed for row in rows)
        order = rows[0].order
        bound = whole
        if order.compose is not as_it_is or order.penalty is not None:
            trees_alone = [
                {name: tensor[at] for name, tensor in whole.items()} for at in range(len(rows))
            ]
        if order.compose is not as_it_is:
            composed = [
                row.order.compose(tree) for row, tree in zip(rows, trees_alone, strict=True)
            ]
            bound = {name: torch.stack([tree[name] for tree in composed]) for name in composed[0]}
        model = bindings.enter_context(
            adapted.bound(order.plan, bound, dropout, packing=batch.packing)
        )
        losses = client_means(token_losses(model, batch), batch, len(rows))
        if order.penalty is None:
            return losses
        penalties = [
            row.order.penalty(tree)  # type: ignore[misc]
            for row, tree in zip(rows, trees_alone, strict=True)
        ]
        return losses + torch.stack(penalties)

    def _too_much(self, done: int) -> str:
        chosen = [example for client in self.clients for example in client.batch(done)]
        longest = max(len(example.ids) for example in chosen)
        can = can_checkpoint(self.base.adapted.model)
        return (
            f"out of memory on {self.base.adapted.device} with a batch of {len(chosen)} examples "
            f"of up to {longest} tokens; lower --batch-size or --max-length (or pass_tokens, where "
            f"several clients train at once){', or set --gradient-checkpointing' if can else ''}"
        )


def packs(base: Base, examples: Sequence[Example]) -> bool:
    """Whether examples can stand in one row: of a causal model, and short enough for it."""
    return all(
        example.label is None and len(example.ids) <= base.adapted.packs.longest
        for example in examples
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; the CPU's allocator has no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _known(moments: Moments | None, names: Sequence[Name], device: torch.device) -> Moments | None:
    """AdamW's state to go on with, if there is one, for exactly the names that it will move."""
    if moments is None or not moments.steps:
        return None
    trees.require_same_names(moments.first, names, "the carried optimiser state")
    first, second = (trees.on(tree, device) for tree in (moments.first, moments.second))
    return Moments(first, second, moments.steps)
