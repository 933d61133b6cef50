"""A tree that is bound to a model: what the slots and the head add at every layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedalt.adapters.lowrank import Combination, add_low_rank, times
from fedalt.adapters.plan import HEAD, Mixer, Plan, Router, Similarity, Sum
from fedalt.core.seeds import generator
from fedalt.core.tree import Name, Tree, require_same_names

# Dropout while training: one seed for each client, so that grouping them changes no mask.
DropoutSeeds = tuple[int, ...]
# Is told, site by site, the weights (tokens, slots) that a mixer or router gave to the tokens of
# the flattened batch.
Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Bound:
    """A tree under a plan. Every tensor carries the client axis; `clients` is its length."""

    plan: Plan
    tree: Tree
    clients: int
    dropout: DropoutSeeds | None
    shares: Tensor | None  # (examples, slots), where a plan wants them for each example
    spans: tuple[int, ...] | None  # tokens of each client, where they are not equal
    packed: bool
    rows: tuple[int, ...] | None = None  # of each client in a padded batch, where not equal
    watch: Watch | None = None
    unwatched: frozenset[str] = frozenset()  # sites that do not see all tokens in their order

    def adapt(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """The base layer's output y (batch, ..., d_out) plus what the slots make of x."""
        combine, gate = self.plan.combine, self.plan.gate
        # What dropout keeps counts for what it drops.
        stays = 1.0 if self.dropout is None else 1 / (1 - self.plan.dropout)
        combination = Combination(
            ranks=tuple(slot.rank for slot in self.plan.slots),
            scalings=tuple(slot.scaling * stays for slot in self.plan.slots),
            weights=self._weights(x),
            router=combine if isinstance(combine, Router) else None,
            watch=self._watch(site),
        )
        factors = (
            [self.tree[Name(site, slot.name, "A")] for slot in self.plan.slots],
            [self.tree[Name(site, slot.name, "B")] for slot in self.plan.slots],
            None if gate is None else self.tree[Name(site, gate[0], "G")],
        )
        spans = self._spans(x)
        rows = self._by_client(x, spans)
        low = y.reshape(*rows.shape[:2], y.shape[-1])
        out = add_low_rank(low, rows, self._keep(site, rows, spans), combination, factors, spans)
        return out.reshape(y.shape)

    def _watch(self, site: str) -> Callable[[Tensor], None] | None:
        watch = self.watch
        if watch is None or site in self.unwatched:
            return None
        return lambda weights: watch(site, weights.reshape(-1, weights.shape[-1]))

    def _spans(self, x: Tensor) -> tuple[int, ...] | None:
        """The numbers of tokens of each client in an input, where they are not equal."""
        if self.rows is None:
            return self.spans
        # Beams stand side by side, as many rows for each text, and a text has any number of tokens.
        tokens = x[..., 0].numel() // sum(self.rows)
        return tuple(count * tokens for count in self.rows)

    def _weights(self, x: Tensor) -> tuple[float, ...] | Tensor | None:
        """Fixed weights: of the slots, or (C, N, slots) where examples differ."""
        match self.plan.combine:
            case Mixer() | Router():
                return None
            case Sum(weights):
                return weights
            case Similarity():
                assert self.shares is not None
                # Beams stand side by side, as many rows for each example, and so do tokens.
                tokens = x[..., 0].numel() // self.shares.shape[0]
                shares = self.shares.repeat_interleave(tokens, 0)
                return self._by_client(shares, self._spans(shares))

    def _keep(self, site: str, rows: Tensor, spans: tuple[int, ...] | None) -> Tensor | None:
        """1 where an input stays and 0 where it drops out, 16 bits each, in the shape of rows."""
        if self.dropout is None or self.plan.dropout == 0:
            return None
        # Seeded by what it is for and not by who drew before: a layer that gradient checkpointing
        # runs twice sees the same mask twice. Four numbers of 16 bits come from one of 64.
        spans = spans or (rows.shape[1],) * self.clients
        parts = []
        for seed, span in zip(self.dropout, spans, strict=True):
            size = span * rows.shape[-1]
            bits = torch.empty(-(-size // 4), dtype=torch.int64, device=rows.device)
            stream = generator(seed, "dropout", site, device=rows.device)
            parts.append(bits.random_(-(2**63), None, generator=stream).view(torch.int16)[:size])
        least = round(self.plan.dropout * 2**16) - 2**15
        return torch.cat(parts).ge_(least).view(rows.shape)

    def _by_client(self, x: Tensor, spans: tuple[int, ...] | None) -> Tensor:
        """(batch, ..., d_in) -> (C, N, d_in), or (1, N, d_in) where clients differ in tokens."""
        if spans is not None:
            return x.reshape(1, -1, x.shape[-1])
        if not self.packed and x.shape[0] % self.clients:
            raise ValueError(
                f"a batch of {x.shape[0]} rows does not split into equal blocks "
                f"for {self.clients} clients"
            )
        return x.reshape(self.clients, -1, x.shape[-1])

    def project(self, site: str, x: Tensor) -> Tensor:
        """A trained head: x (batch, ..., d_in) times the bound weight, plus the bound bias."""
        spans = self._spans(x)
        rows = self._by_client(x, spans)
        weight = self.tree[Name(site, HEAD, "weight")].to(x.dtype)
        out = times(rows, weight.mT, spans)
        if (bias := self.tree.get(Name(site, HEAD, "bias"))) is not None:
            bias = bias.to(x.dtype)
            if spans is None:
                out = out + bias[:, None]
            else:
                out = out + bias.repeat_interleave(torch.tensor(spans, device=x.device), 0)
        return out.reshape(*x.shape[:-1], -1)


class Adapters(Protocol):
    """What the wrapped layers of a model can be pointed at."""

    def adapt(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """The base layer's output y (batch, ..., d_out) and what is added to it for an input x."""

    def project(self, site: str, x: Tensor) -> Tensor:
        """What a classifier's head makes of x (batch, ..., d_in)."""


class Binding:
    """The one mutable cell that all wrapped layers of a model look at."""

    current: Adapters | None = None


def with_client_axis(
    tree: Mapping[Name, Tensor], shapes: Mapping[Name, tuple[int, ...]]
) -> tuple[Tree, int]:
    """The tree with the client axis that it may lack, and how many clients that holds.

    Raises ValueError where names or shapes are not those needed, or the tensors differ in clients.
    """
    require_same_names(tree, shapes, "the tree to bind")
    full: Tree = {}
    for name, tensor in tree.items():
        full[name] = tensor if tensor.dim() > len(shapes[name]) else tensor[None]
        if tuple(full[name].shape[1:]) != shapes[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, the plan needs {shapes[name]}")
    first = next(iter(full), None)
    clients = 1 if first is None else full[first].shape[0]
    for name, tensor in full.items():
        if tensor.shape[0] != clients:
            raise ValueError(
                f"{name} holds {tensor.shape[0]} clients, but {first} holds {clients}: "
                "the tensors of a bound tree share one client axis"
            )
    return full, clients
