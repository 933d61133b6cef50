"""Adapters are bound, not owned: wrapped layers of a base model are pointed at a tree's tensors."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalt.adapters.binding import Adapters, Binding, Bound, DropoutSeeds, Watch, with_client_axis
from fedalt.adapters.last_token import pick_last_tokens
from fedalt.adapters.packing import Packing, Packs, packed, try_packing
from fedalt.adapters.plan import HEAD, Plan, Shape, Similarity
from fedalt.adapters.sites import chosen, head_layers, linear_layers, shape_of
from fedalt.core.tree import Name


class AdaptedLinear(nn.Module):
    """A frozen linear layer and, while a tree is bound, that tree's slots beside it."""

    def __init__(self, base_layer: nn.Module, site: str, binding: Binding) -> None:
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

    def __init__(self, base_layer: nn.Linear, site: str, binding: Binding) -> None:
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
    the trees of one client alone can be bound, as the sites of `partial` do not see all texts.
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
        self._binding = Binding()
        heads = head_layers(model, fresh)
        classifies = bool(heads)
        linear = linear_layers(model, fresh)
        sites = chosen(model, {path: layer for path, (layer, _) in linear.items()}, targets)
        self.partial = frozenset(site for site in sites if not linear[site][1])
        self.shares_passes = not self.partial
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
        dropout: DropoutSeeds | None = None,
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
        full, clients = with_client_axis(tree, {**plan.shapes(self.sites), **self.heads})
        self._require_one_client(clients, shares)
        if dropout is not None and len(dropout) != clients:
            raise ValueError(f"{len(dropout)} dropout seeds for {clients} clients")
        if (shares is None) == isinstance(plan.combine, Similarity):
            raise ValueError(
                "weights for each example belong to a plan of similarity, and to no other"
            )
        if rows is not None and len(rows) != clients:
            raise ValueError(f"numbers of texts of {len(rows)} clients for {clients} clients")
        bound = Bound(
            plan,
            full,
            clients,
            dropout,
            shares,
            spans=None if packing is None else packing.spans,
            packed=packing is not None,
            rows=None if rows is None or len(set(rows)) == 1 else tuple(rows),
            watch=watch,
            unwatched=self.partial,
        )
        with packed(packing), self.pointed_at(bound) as model:
            yield model

    @contextmanager
    def pointed_at(self, adapters: Adapters) -> Iterator[PreTrainedModel]:
        """Within this context the wrapped layers ask these adapters. Nests."""
        before, self._binding.current = self._binding.current, adapters
        try:
            yield self.model
        finally:
            self._binding.current = before

    def _require_one_client(self, clients: int, shares: Tensor | None) -> None:
        """Raise ValueError for what a model whose layers do not see all texts cannot do."""
        if not self.shares_passes and (clients > 1 or shares is not None):
            raise ValueError(
                f"an adapted layer of this {self.model.config.model_type} model does not see all "
                "texts in their order: clients cannot share a pass, and no weights of each text "
                "can be told from others"
            )

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
