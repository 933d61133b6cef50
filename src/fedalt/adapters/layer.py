"""Adapters are bound, not owned: wrapped layers of a base model are pointed at a tree's tensors."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalt.adapters.last_token import pick_last_tokens
from fedalt.adapters.lowrank import Combination, add_low_rank, times
from fedalt.adapters.packing import Packing, Packs, packed, try_packing
from fedalt.adapters.plan import HEAD, Mixer, Plan, Router, Shape, Similarity, Sum
from fedalt.adapters.sites import chosen, head_layers, linear_layers, shape_of
from fedalt.core.seeds import generator
from fedalt.core.tree import Name, Tree, require_same_names


@dataclass(frozen=True)
class Noise:
    """Dropout while training: one seed per client, so that grouping clients changes no mask."""

    seeds: tuple[int, ...]


# Is told, site by site, the weights (tokens, slots) that a mixer or router gave to the tokens of
# the flattened batch.
Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class _Bound:
    """A tree under a plan. Every tensor carries the client axis; `clients` is its length."""

    plan: Plan
    tree: Tree
    clients: int
    noise: Noise | None
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
        stays = 1.0 if self.noise is None else 1 / (1 - self.plan.dropout)
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
        if self.watch is None or site in self.unwatched:
            return None
        return partial(self._saw, self.watch, site)

    def _saw(self, watch: Watch, site: str, weights: Tensor) -> None:
        watch(site, weights.reshape(-1, weights.shape[-1]))

    def _spans(self, x: Tensor) -> tuple[int, ...] | None:
        """The numbers of tokens of each client in an input, where they are not equal."""
        if self.rows is None:
            return self.spans
        # Beams stand side by side, as many rows for each text, and a text has any number of tokens.
        each = x[..., 0].numel() // sum(self.rows)
        return tuple(count * each for count in self.rows)

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
                each = x[..., 0].numel() // self.shares.shape[0]
                shares = self.shares.repeat_interleave(each, 0)
                return self._by_client(shares, self._spans(shares))

    def _keep(self, site: str, rows: Tensor, spans: tuple[int, ...] | None) -> Tensor | None:
        """1 where an input stays and 0 where it drops out, 16 bits each, in the shape of rows."""
        if self.noise is None or self.plan.dropout == 0:
            return None
        # Seeded by what it is for and not by who drew before: a layer that gradient checkpointing
        # runs twice sees the same mask twice. Four numbers of 16 bits come from one of 64.
        spans = spans or (rows.shape[1],) * self.clients
        parts = []
        for seed, span in zip(self.noise.seeds, spans, strict=True):
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


class _Binding:
    """The one mutable cell that all wrapped layers of a model look at."""

    current: _Bound | None = None


class AdaptedLinear(nn.Module):
    """A frozen linear layer and, while a tree is bound, that tree's slots beside it."""

    def __init__(self, base_layer: nn.Module, site: str, binding: _Binding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self._binding = binding

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its dtype."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return cast(Tensor | None, self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., d_in) -> (batch, ..., d_out); the batch is grouped client by client."""
        y: Tensor = self.base_layer(x)
        bound = self._binding.current
        return y if bound is None else bound.adapt(self.site, x, y)


class BoundHead(nn.Module):
    """A linear layer of a classifier's head: fully trained, by each client for itself."""

    def __init__(self, base_layer: nn.Linear, site: str, binding: _Binding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self._binding = binding

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., d_in) -> (batch, ..., d_out)."""
        bound = self._binding.current
        if bound is None:
            return cast(Tensor, self.base_layer(x))
        return bound.project(self.site, x)


class AdaptedModel:
    """A frozen transformers model whose linear layers can be bound to a tree.

    `sites` maps the path of every adapted layer to its sizes, `heads` name to shape of the tensors
    of a classification head. Both are in the order of the model's layers. Without `shares_passes`
    the trees of one client alone can be bound.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: str | Sequence[str] | None = None,
        *,
        fresh: Collection[str] = (),
    ) -> None:
        """Wrap the layers in place.

        `targets`: None for PEFT's default of this architecture, "all-linear", or names that end
        the paths of the wanted layers. A name that ends none raises ValueError. `fresh` names
        tensors that the model's checkpoint lacks: a classifier's layers of such are trained with
        its head.
        """
        self.model = model.requires_grad_(False).eval()
        _keep_differentiable(model)
        self._binding = _Binding()
        heads = head_layers(model, fresh)
        classifies = bool(heads)
        linear = linear_layers(model, fresh)
        sites = chosen(model, {path: layer for path, (layer, _) in linear.items()}, targets)
        self._partial = frozenset(site for site in sites if not linear[site][1])
        self.shares_passes = not self._partial
        if classifies:
            self.packs = Packs(0, "it classifies")
        elif not self.shares_passes:
            self.packs = Packs(0, "an adapted layer does not see all tokens in their order")
        else:
            self.packs = try_packing(model)
        self.sites: dict[str, Shape] = {}
        for site in sites:
            layer, _ = linear[site]
            self.sites[site] = shape_of(layer)
            _put(model, site, AdaptedLinear(layer, site, self._binding))
        self.heads: dict[Name, tuple[int, ...]] = {}
        for site, layer in heads.items():
            self.heads[Name(site, HEAD, "weight")] = tuple(layer.weight.shape)
            if layer.bias is not None:
                self.heads[Name(site, HEAD, "bias")] = tuple(layer.bias.shape)
            _put(model, site, BoundHead(layer, site, self._binding))
        pick_last_tokens(model)

    @contextmanager
    def bound(
        self,
        plan: Plan,
        tree: Mapping[Name, Tensor],
        noise: Noise | None = None,
        shares: Tensor | None = None,
        packing: Packing | None = None,
        *,
        rows: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[PreTrainedModel]:
        """Within this context the model computes with the tree's tensors.

        The tensors have the plan's shapes, or all of them one more axis in front, of one length
        C; then a batch consists of C equal blocks of rows, client by client. The names must be
        exactly those that the plan and the head need. Nests; the tree may not change meanwhile.
        `shares` (examples, slots) are the weights of a plan that weighs slots example by example,
        in the order of the batch. With a `packing` the batch is one row of texts, client by client.
        Without a packing, `rows` are the numbers of texts of each client, which need not be equal;
        a text may stand in several rows, one below the other, as beams do. `watch` is told how a
        mixer or router weighs the slots.
        """
        needed = {**plan.shapes(self.sites), **self.heads}
        require_same_names(tree, needed, "the tree to bind")
        with_axis: Tree = {}
        for name, tensor in tree.items():
            full = tensor if tensor.dim() > len(needed[name]) else tensor[None]
            if tuple(full.shape[1:]) != needed[name]:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, the plan needs {needed[name]}")
            with_axis[name] = full
        first = next(iter(with_axis), None)
        axis = 1 if first is None else with_axis[first].shape[0]
        for name, full in with_axis.items():
            if full.shape[0] != axis:
                raise ValueError(
                    f"{name} holds {full.shape[0]} clients, but {first} holds {axis}: "
                    "the tensors of a bound tree share one client axis"
                )
        if not self.shares_passes and (axis > 1 or shares is not None):
            raise ValueError(
                f"an adapted layer of this {self.model.config.model_type} model does not see all "
                "texts in their order: clients cannot share a pass, and no weights of each text "
                "can be told from others"
            )
        if noise is not None and len(noise.seeds) != axis:
            raise ValueError(f"{len(noise.seeds)} dropout seeds for {axis} clients")
        if (shares is None) == isinstance(plan.combine, Similarity):
            raise ValueError(
                "weights for each example belong to a plan of similarity, and to no other"
            )
        if rows is not None and len(rows) != axis:
            raise ValueError(f"numbers of texts of {len(rows)} clients for {axis} clients")
        before = self._binding.current
        spans = None if packing is None else packing.spans
        uneven = None if rows is None or len(set(rows)) == 1 else tuple(rows)
        self._binding.current = _Bound(
            plan,
            with_axis,
            axis,
            noise,
            shares,
            spans,
            packing is not None,
            uneven,
            watch,
            unwatched=self._partial,
        )
        try:
            with packed(packing):
                yield self.model
        finally:
            self._binding.current = before

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        device: torch.device = self.model.device
        return device


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights.

    On a CPU with AVX512-BF16 it does so when a layer is first evaluated, for good, into a layout
    that has no backward pass: all gradients through the layer would be zero from then on.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
