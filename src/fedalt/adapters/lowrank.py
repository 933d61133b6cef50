"""The arithmetic of an adapted site: one fused down-projection, one fused up-projection.

With C clients, N tokens each, slots i of rank r_i (R = sum r_i) and inputs x:

    h_i = drop(x) A_i^T        w = softmax(x G^T), or fixed        out = y + sum_i s_i w_i h_i B_i^T

A router's G has more rows than there are slots: of the softmax only the largest entries count, and
w_i is the sum of those whose row is mapped to slot i.

All A and the G of a mixer or router lie in one matrix, all B in another. The backward pass is
written out because autograd, given the joined matrices, would also multiply out weight gradients of
frozen slots. It recomputes h and w from the inputs instead of keeping them: that costs a matmul of
width R, keeps nothing per token, and makes it differentiable once more (bilevel methods need that).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalt.adapters.plan import Router


@dataclass(frozen=True)
class Combination:
    """How slots combine: `scalings` s_i and, unless logits decide, fixed `weights` w_i.

    As a tensor, fixed weights broadcast to (C, N, slots); they carry no gradient. Logits are a
    mixer's (C, N, slots), or those of the `router` (C, N, 2 slots - 1). `watch` is told the w_i
    that a forward pass makes of logits, (C, N, slots).
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    weights: tuple[float, ...] | Tensor | None
    router: Router | None = None
    watch: Callable[[Tensor], None] | None = None

    def shares(self, logits: Tensor | None, like: Tensor) -> Tensor:
        """w_i: (C, N, slots) from the logits, or as fixed."""
        if logits is None:
            assert self.weights is not None
            if isinstance(self.weights, Tensor):
                return self.weights.to(like)
            return like.new_tensor(self.weights)[None, None]
        if self.router is not None:
            _, counted = self._choose(self.router, logits)
            return (counted @ self._mapped(self.router, counted)).to(like.dtype)
        return _accurate(logits).softmax(-1).to(like.dtype)

    def amounts(self, logits: Tensor | None, like: Tensor) -> Tensor:
        """s_i w_i, in the shape of `shares`."""
        return self.shares(logits, like) * like.new_tensor(self.scalings)

    def to_rows(self, per_slot: Tensor) -> Tensor:
        """(..., slots) -> (..., R): each slot's number for each of its rank rows."""
        parts = [
            part.expand(*part.shape[:-1], rank)
            for part, rank in zip(per_slot.split(1, -1), self.ranks, strict=True)
        ]
        return torch.cat(parts, -1)

    def to_slots(self, per_row: Tensor) -> Tensor:
        """(..., R) -> (..., slots): the sum over each slot's rank rows."""
        return torch.stack([part.sum(-1) for part in per_row.split(self.ranks, -1)], -1)

    def softmax_gradient(self, logits: Tensor, grad_z: Tensor, h: Tensor) -> Tensor:
        """What the logits (C, N, slots or rows) get from the gradient of z = s w h (C, N, R)."""
        if self.router is not None:
            soft, counted = (part.to(h.dtype) for part in self._choose(self.router, logits))
            to_slots = self.to_slots(grad_z * h) * h.new_tensor(self.scalings)
            pull = (to_slots @ self._mapped(self.router, h).T) * counted
            return pull - soft * pull.sum(-1, keepdim=True)
        shares = self.shares(logits, h)
        pull = self.to_slots(grad_z * h) * shares * h.new_tensor(self.scalings)
        return pull - shares * pull.sum(-1, keepdim=True)

    def _choose(self, router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A softmax over rows, and what counts of it: 0 where a row is not chosen.

        Renormalised weights are the softmax over the chosen rows alone.
        """
        logits = _accurate(logits)
        top = logits.topk(len(self.ranks), -1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top, True)
        if router.renormalise:
            soft = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
            return soft, soft
        soft = logits.softmax(-1)
        return soft, soft * chosen

    def _mapped(self, router: Router, like: Tensor) -> Tensor:
        """(rows, slots): 1 where a row is mapped to a slot, else 0."""
        slots = range(len(self.ranks))
        rows = router.slot_map(len(slots))
        return like.new_tensor([[float(slot == mapped) for slot in slots] for mapped in rows])


def _accurate(logits: Tensor) -> Tensor:
    """In float32: the weights of a bf16 row would not sum to 1. float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def add_low_rank(
    y: Tensor,
    x: Tensor,
    keep: Tensor | None,
    combination: Combination,
    factors: tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None],
    spans: Sequence[int] | None = None,
) -> Tensor:
    """Add the slots' mixed output to the base layer's output.

    Shapes: y (C, N, d_out), x (C, N, d_in), keep (C, N, d_in) to multiply x with; factors are
    the A of each slot (C, r_i, d_in), the B of each (C, d_out, r_i) and G (C, slots or rows, d_in).
    Where clients have different numbers of tokens, `spans` are these numbers and the leading axes
    are (1, sum of spans). Returns y's shape and dtype. Factors of a higher precision than y are
    cast for the matmuls; their gradients come back in their own. Differentiable twice without
    `spans`.
    """
    a, b, g = factors
    out: Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]  # torch declares it so
        y, x, keep, combination, spans, *a, *b, *(() if g is None else (g,))
    )
    return out


def times(rows: Tensor, matrices: Tensor, spans: Sequence[int] | None) -> Tensor:
    """Every client's rows (N, k) times its own matrix (k, m)."""
    if spans is None:
        return rows @ matrices
    out = rows.new_empty(1, rows.shape[1], matrices.shape[2])
    parts = zip(rows[0].split(spans), matrices, out[0].split(spans), strict=True)
    for part, matrix, place in parts:
        torch.mm(part, matrix, out=place)
    return out


def _plus_times(y: Tensor, rows: Tensor, matrices: Tensor, spans: Sequence[int] | None) -> Tensor:
    """The same added to y."""
    if spans is None:
        return torch.baddbmm(y, rows, matrices)
    out = torch.empty_like(y)
    before, lefts, places = (tensor[0].split(spans) for tensor in (y, rows, out))
    parts = zip(before, lefts, matrices, places, strict=True)
    for part, left, matrix, place in parts:
        torch.addmm(part, left, matrix, out=place)
    return out


def _products(rows: Tensor, other: Tensor, spans: Sequence[int] | None) -> Tensor:
    """rows^T other of every client: (C, k, m)."""
    if spans is None:
        return rows.mT @ other
    out = rows.new_empty(len(spans), rows.shape[2], other.shape[2])
    for part, right, place in zip(rows[0].split(spans), other[0].split(spans), out, strict=True):
        torch.mm(part.T, right, out=place)
    return out


@dataclass(frozen=True)
class Joined:
    """The factors side by side: `ag` (C, R + rows, d_in), all A and below them G; b (C, d_out, R).

    Without a mixer or router there are no rows of G.
    """

    ag: Tensor
    b: Tensor
    spans: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        factors: Sequence[Tensor],
        slots: int,
        dtype: torch.dtype,
        spans: Sequence[int] | None,
    ) -> "Joined":
        """From the A of each slot, the B of each and, where there is one, G."""
        cast = [factor.to(dtype) for factor in factors]
        a, b, g = cast[:slots], cast[slots : 2 * slots], cast[2 * slots :]
        return cls(
            torch.cat([*a, *g], 1) if len(a) + len(g) > 1 else a[0],
            torch.cat(b, 2) if slots > 1 else b[0],
            spans,
        )

    @property
    def a(self) -> Tensor:
        """(C, R, d_in)."""
        return self.ag[:, : self.b.shape[2]]

    @property
    def g(self) -> Tensor | None:
        """(C, rows, d_in)."""
        rank = self.b.shape[2]
        return self.ag[:, rank:] if self.ag.shape[1] > rank else None

    def down(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The dropped input, h (C, N, R) and the logits (C, N, rows of g)."""
        g = self.g
        if keep is not None:
            dropped = x * keep.to(x.dtype)
            h = times(dropped, self.a.mT, self.spans)
            return dropped, h, None if g is None else times(x, g.mT, self.spans)
        both = times(x, self.ag.mT, self.spans)
        if g is None:
            return x, both, None
        h, logits = both.split([self.b.shape[2], g.shape[1]], -1)
        return x, h, logits

    def mixed(self, x: Tensor, keep: Tensor | None, combination: Combination) -> Tensor:
        """The mixed h: s w h (C, N, R), which B turns into what is added to the base output."""
        _, h, logits = self.down(x, keep)
        shares = combination.shares(logits, h)
        if combination.watch is not None and logits is not None:
            combination.watch(shares)
        return h * combination.to_rows(shares * h.new_tensor(combination.scalings))


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        keep: Tensor | None,
        combination: Combination,
        spans: Sequence[int] | None,
        *factors: Tensor,
    ) -> Tensor:
        joined = Joined.of(factors, len(combination.ranks), y.dtype, spans)
        z = joined.mixed(x.to(y.dtype), keep, combination)
        ctx.save_for_backward(x, keep, *factors)
        ctx.combination, ctx.dtype, ctx.spans = combination, y.dtype, spans
        return _plus_times(y, z, joined.b.mT, spans)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        saved_x, keep, *factors = ctx.saved_tensors
        combination: Combination = ctx.combination
        spans: Sequence[int] | None = ctx.spans
        slots = len(combination.ranks)
        _, needs_x, _, _, _, *needs = ctx.needs_input_grad
        joined = Joined.of(factors, slots, ctx.dtype, spans)
        x = saved_x.to(ctx.dtype)
        dropped, h, logits = joined.down(x, keep)
        rows = combination.to_rows(combination.amounts(logits, h))

        grad_z = times(grad, joined.b, spans)
        grad_h = grad_z * rows
        grad_logits = None
        if logits is not None:
            grad_logits = combination.softmax_gradient(logits, grad_z, h)

        grad_x = None
        if needs_x:
            grad_x = times(grad_h, joined.a, spans)
            if keep is not None:
                grad_x = grad_x * keep.to(grad_x.dtype)
            if grad_logits is not None and joined.g is not None:
                grad_x = _plus_times(grad_x, grad_logits, joined.g, spans)
            grad_x = grad_x.to(saved_x.dtype)

        def per_trained_slot(
            low: Tensor, other: Tensor, needs: Sequence[bool]
        ) -> list[Tensor | None]:
            """low^T other for the slots that train: (C, r_i, d) each; None for frozen ones."""
            parts = low.split(combination.ranks, -1)
            return [
                _products(part, other, spans) if needed else None
                for part, needed in zip(parts, needs, strict=True)
            ]

        grad_a = per_trained_slot(grad_h, dropped, needs[:slots])
        grad_b = per_trained_slot(h * rows, grad, needs[slots : 2 * slots])
        grad_b = [None if part is None else part.mT for part in grad_b]
        grad_g = []
        if grad_logits is not None:
            grad_g = [_products(grad_logits, x, spans) if needs[-1] else None]
        return (
            grad,
            grad_x,
            None,
            None,
            None,
            *(
                None if part is None else part.to(factor.dtype)
                for part, factor in zip([*grad_a, *grad_b, *grad_g], factors, strict=True)
            ),
        )
