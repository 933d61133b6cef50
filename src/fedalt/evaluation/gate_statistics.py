"""How a mixer or router weighs the slots, token by token, seen in passes that run anyway."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from fedalt.adapters.binding import Watch
from fedalt.adapters.plan import Plan
from fedalt.core import tree as trees
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.training.loss import segments_for

BINS: Final = 20

# A site and its weights (tokens, slots) in a pass, which has several of a layer that blocks share.
_Call = tuple[str, Tensor]


@dataclass(frozen=True)
class Weighing:
    """What a client's mixers or routers did to some of its tokens.

    `weights`: for each site the mean weight of each slot. `histogram`: how often the weight of the
    first slot, over tokens and sites, lies in each of 20 equal bins of [0, 1]. A site that blocks
    share counts in each of them.
    """

    slots: tuple[str, ...]
    weights: dict[str, tuple[float, ...]]
    histogram: tuple[int, ...]


@dataclass
class Tally:
    """The weights that each client's first so many `examples` get, added up pass by pass.

    For each site `sums` (clients, slots) of the weights of `tokens` (clients,), all on the CPU; a
    site that blocks share has several of a pass. `bins` (clients, 20) are those of `Weighing`.
    """

    plan: Plan
    clients: int
    examples: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bins = torch.zeros(self.clients, BINS, dtype=torch.long)

    @contextmanager
    def counting(self, seen: Sequence[tuple[int, range]], tokens: int) -> Iterator[Watch]:
        """While a pass of so many `tokens` runs, these of them count, each for its client."""
        whole: list[_Call] = []
        yield _keeping(whole, tokens)
        rows = torch.cat([torch.arange(where.start, where.stop) for _, where in seen])
        sizes = torch.tensor([len(where) for _, where in seen])
        owners = torch.tensor([client for client, _ in seen]).repeat_interleave(sizes)
        if whole:
            self._add(whole, rows, owners)

    def of(self, client: int) -> Weighing | None:
        """One client's share; None where no site sees every token."""
        means = {
            site: tuple((self.sums[site][client] / tokens[client]).tolist())
            for site, tokens in self.tokens.items()
            if tokens[client]
        }
        slots = tuple(slot.name for slot in self.plan.slots)
        return Weighing(slots, means, tuple(self.bins[client].tolist())) if means else None

    def _add(self, calls: Sequence[_Call], rows: Tensor, owners: Tensor) -> None:
        """Add these rows of every call's weights, each for its owner, all calls at once."""
        # A pass's weights are few: what follows is faster on the CPU than many small kernels.
        joined = torch.stack([weights for _, weights in calls], 1).float().cpu()[rows]
        sums = joined.new_zeros(self.clients, *joined.shape[1:]).index_add(0, owners, joined)
        places = (joined[..., 0] * BINS).long().clamp(0, BINS - 1) + owners[:, None] * BINS
        bins = places.flatten().bincount(minlength=self.clients * BINS)
        self.bins += bins.reshape(self.clients, BINS)
        tokens = owners.bincount(minlength=self.clients)
        for at, (site, _) in enumerate(calls):
            self.sums[site] = self.sums.get(site, 0) + sums[:, at]
            self.tokens[site] = self.tokens.get(site, 0) + tokens


@torch.no_grad()
def weights_by_site(
    base: Base, serving: Serving, ids: Sequence[int], segments: Sequence[int] = ()
) -> dict[str, Tensor]:
    """For each site the weights of the slots, (tokens, slots) float32, for the tokens of a text.

    Of a site that blocks share it is the mean over them. Sites that see anything but these tokens
    in their order are left out. `segments`: those of a classifier's example. Raises ValueError for
    a plan that does not weigh its slots token by token.
    """
    if serving.plan.gate is None:
        raise ValueError("the plan has no mixer or router: every token's weights are the same")
    device = base.adapted.device
    calls: list[_Call] = []
    tree = trees.on(serving.tree, device)
    with base.adapted.bound(serving.plan, tree, watch=_keeping(calls, len(ids))) as model:
        row = torch.tensor([list(ids)], device=device)
        of_pair = torch.tensor([list(segments)], device=device) if segments else None
        model.base_model(input_ids=row, **segments_for(model, of_pair))
    by_site: dict[str, list[Tensor]] = {}
    for site, weights in calls:
        by_site.setdefault(site, []).append(weights.float().cpu())
    return {site: torch.stack(each).mean(0) for site, each in by_site.items()}


def weights_of(
    base: Base, serving: Serving, ids: Sequence[int], segments: Sequence[int] = ()
) -> Tensor | None:
    """The same as a mean over sites: (tokens, slots) float32; None where there are none."""
    by_site = weights_by_site(base, serving, ids, segments)
    return torch.stack(list(by_site.values())).mean(0) if by_site else None


def _keeping(calls: list[_Call], tokens: int) -> Watch:
    """Keeps the weights of calls with all tokens: a pooler sees one of each text."""

    def watch(site: str, weights: Tensor) -> None:
        if len(weights) == tokens:
            calls.append((site, weights))

    return watch
