"""Texts that go on together, a token at a time: each row with the adapters of its own client."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from fedalt.adapters.lowrank import Combination
from fedalt.adapters.reach import read
from fedalt.adapters.shelf import Joint, Shelf, joint
from fedalt.evaluation.cache import cache_for
from fedalt.evaluation.group import Group, Ids, shares_of
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.serving.cache import Columns


@dataclass(frozen=True)
class Adapters:
    """What a row adds to the base model: a client's serving, or nothing.

    Rows of equal `key` have the same.
    """

    key: Hashable
    serving: Serving | None
    factors: Joint | None

    @classmethod
    def of(cls, base: Base, key: Hashable, serving: Serving | None) -> "Adapters":
        """Those of a serving, on the CPU until a row asks for them."""
        if serving is None:
            return cls(key, None, None)
        return cls(key, serving, joint(serving.plan, serving.tree, list(base.adapted.sites)))

    def shares(self, base: Base, prompt: Ids) -> Tensor | None:
        """(1, slots): the weights of the slots for a prompt, where the plan wants them."""
        if self.serving is None:
            return None
        shares = shares_of(Group(base, [self.serving]), [[prompt]], 1)
        return None if shares is None else shares[0]


class Batch(Protocol):
    """Rows of texts, in the order in which they joined but for the last, which fills gaps."""

    def join(self, adapters: Adapters, prompt: Ids) -> Tensor:
        """Another row; the logits (1, vocabulary) of what follows its prompt."""

    def leave(self, row: int) -> None:
        """The row is gone, and the last one takes its place."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of every row; the logits (rows, vocabulary) of what follows."""

    @property
    def held(self) -> int:
        """The tokens whose keys and values there are buffers for."""


def can_share(base: Base) -> bool:
    """Whether rows of different lengths and clients can go through the model together."""
    keeps = cache_for(base.adapted.model, 1) is not None
    return keeps and base.adapted.shares_passes and base.bears_padding_before


class Together:
    """All rows in one pass, whatever client they are of; see `Batch`."""

    def __init__(self, base: Base, kind: Combination) -> None:
        model = base.adapted.model
        self._base = base
        self._shelf = Shelf(
            kind, base.adapted.sites, torch.empty(0, dtype=model.dtype).to(model.device)
        )
        self._taken = frozenset(signature(model.forward).parameters)
        self._columns = Columns()
        self._places: list[int] = []
        self._shares: list[Tensor] = []

    def join(self, adapters: Adapters, prompt: Ids) -> Tensor:
        """See `Batch`."""
        place = self._shelf.place(adapters.key, adapters.factors, self._places)
        shares = adapters.shares(self._base, prompt)
        if shares is None:
            shares = torch.zeros(1, len(self._shelf.kind.ranks))
        cache: Any = cache_for(self._base.adapted.model, len(prompt))
        ids = torch.tensor([prompt], device=self._base.adapted.device)
        positions = torch.arange(len(prompt), device=ids.device)[None]
        logits = self._pass([place], shares, ids, torch.ones_like(ids), positions, cache)
        self._columns.add(cache)
        self._places.append(place)
        self._shares.append(shares)
        return logits

    def leave(self, row: int) -> None:
        """See `Batch`."""
        self._columns.drop(row)
        for of_rows in (self._places, self._shares):
            last: Any = of_rows.pop()
            if row < len(of_rows):
                of_rows[row] = last

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Batch`."""
        ids = torch.tensor(tokens, device=self._base.adapted.device)[:, None]
        mask, positions = self._columns.grow(ids.device)
        shares = torch.cat(self._shares)
        return self._pass(self._places, shares, ids, mask, positions, self._columns.cache)

    @property
    def held(self) -> int:
        """See `Batch`."""
        return self._columns.held

    @property
    def bytes_per_token(self) -> int:
        """What is kept of one token that was read."""
        return self._columns.bytes_per_token

    def _pass(
        self,
        places: Sequence[int],
        shares: Tensor,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any,
    ) -> Tensor:
        rows = self._shelf.rows(places, shares if shares.shape[1] and self._weighed else None)
        with self._base.adapted.pointed_at(rows) as model:
            options = {"position_ids": positions, "logits_to_keep": 1}
            known = {name: options[name] for name in options.keys() & self._taken}
            logits: Tensor = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **known
            ).logits
        return logits[:, -1]

    @property
    def _weighed(self) -> bool:
        """Whether each row brings weights of its own."""
        return self._shelf.kind.weights is not None


class Alone:
    """One row after the other, and all of its text anew for every token.

    For models that cannot share passes, or keep what they have read in a way of their own.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self._rows: list[tuple[Adapters, list[int], Tensor | None]] = []

    def join(self, adapters: Adapters, prompt: Ids) -> Tensor:
        """See `Batch`."""
        self._rows.append((adapters, list(prompt), adapters.shares(self._base, prompt)))
        return self._logits(len(self._rows) - 1)

    def leave(self, row: int) -> None:
        """See `Batch`."""
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Batch`."""
        for (_, ids, _), token in zip(self._rows, tokens, strict=True):
            ids.append(token)
        return torch.cat([self._logits(row) for row in range(len(self._rows))])

    @property
    def held(self) -> int:
        """See `Batch`."""
        return 0

    def _logits(self, row: int) -> Tensor:
        adapters, ids, shares = self._rows[row]
        group = Group(self._base, [] if adapters.serving is None else [adapters.serving])
        with group.bound([(0, [0])], None if shares is None else [shares]) as model:
            return read(model, torch.tensor([ids], device=model.device))[:, -1]
