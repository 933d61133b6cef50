"""Sums of low-rank products and means of rank rows, for clients of different ranks.

A pair stands for the product B A. The sum of K pairs of ranks r_k is one pair of rank R = sum r_k,
and its singular value decomposition needs two QR decompositions of thin matrices and one of a
small square one (FLoRIST takes SVDs of the stacks; QR gives the same for less):

    B = Q_B R_B,   A^T = Q_A R_A,   R_B R_A^T = U S V^T   ->   B A = (Q_B U) S (Q_A V)^T

All of it is float64, so that the order of the clients changes nothing that float32 can hold.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Split = Literal["balanced", "in_b"]


class Pair(NamedTuple):
    """A product B A: B (d_out, rank), A (rank, d_in)."""

    b: Tensor
    a: Tensor


class Directions(NamedTuple):
    """A matrix as U S V^T: u (d_out, p), s (p,) falling and above 0, v (d_in, p)."""

    u: Tensor
    s: Tensor
    v: Tensor


class Rows(NamedTuple):
    """Sums over clients: of weighted rank rows (rank, d), and of each row's weights (rank, 1)."""

    sums: Tensor
    weights: Tensor


def weighted_stack(*weighed: tuple[float, Pair]) -> Pair:
    """sum_k w_k B_k A_k as one pair, whose rank is the sum of the ranks; float64.

    Where that exceeds twice the largest rank of such a matrix, which is the lesser of d_out and
    d_in, it is brought down to it, exactly. Twice, because each time costs a QR decomposition.
    """
    b = torch.cat([pair.b.double() for _, pair in weighed], 1)
    a = torch.cat([pair.a.double() * weight for weight, pair in weighed])
    d_out, d_in = b.shape[0], a.shape[1]
    if a.shape[0] <= 2 * min(d_out, d_in):
        return Pair(b, a)
    if d_in <= d_out:
        q, r = torch.linalg.qr(a.T)
        return Pair(b @ r.T, q.T)
    q, r = torch.linalg.qr(b)
    return Pair(q, r @ a)


def squared_norm(pair: Pair) -> float:
    """|B A|_F^2 = tr(B^T B A A^T), of which only (rank, rank) matrices are computed."""
    b, a = pair.b.double(), pair.a.double()
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)


def core_svd(pair: Pair) -> Directions:
    """The singular value decomposition of B A, without what is 0 to float32's precision.

    The largest element of every column of v is positive: signs do not depend on the order in which
    a stack was built. (Nothing can be said of directions of equal strength.)
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, v = q_b @ u, q_a @ v.T
    signs = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    kept = s > torch.finfo(torch.float32).eps * s[0]
    return Directions((u * signs)[:, kept], s[kept], (v * signs)[:, kept])


def strongest(directions: Directions, rank: int) -> Directions:
    """The best approximation of at most this rank (Eckart and Young)."""
    u, s, v = directions
    return Directions(u[:, :rank], s[:rank], v[:, :rank])


def energy_rank(s: Tensor, tau: float) -> int:
    """The smallest p with s_1^2 + .. + s_p^2 >= tau sum_i s_i^2; s (p,) falling, tau in (0, 1]."""
    energy = s.square().cumsum(0)
    return int((energy < tau * energy[-1]).sum()) + 1 if len(s) else 0


def factors(directions: Directions, split: Split) -> Pair:
    """The pair whose product is U S V^T: sqrt(S) in both factors, or all of S in B."""
    u, s, v = directions
    if split == "in_b":
        return Pair(u * s, v.T)
    return Pair(u * s.sqrt(), (v * s.sqrt()).T)


def add_rows(total: Rows | None, rows: Tensor, weight: float) -> Rows:
    """Count a client's rows (its rank, d) in; rows that it does not have stay as they are."""
    sums, weights = rows.double() * weight, torch.full((len(rows), 1), weight).double()
    if total is None:
        return Rows(sums, weights)
    rank = max(len(rows), len(total.sums))
    return Rows(
        _longer(total.sums, rank) + _longer(sums, rank),
        _longer(total.weights, rank) + _longer(weights, rank),
    )


def owner_mean(total: Rows) -> Tensor:
    """Every rank row's weighted mean over the clients that own it: (largest rank, d)."""
    return total.sums / total.weights


def padded_mean(total: Rows) -> Tensor:
    """The weighted mean over all clients, missing rows taken for zeros: (largest rank, d)."""
    return total.sums / total.weights[:1]  # everybody owns the first row


def _longer(rows: Tensor, rank: int) -> Tensor:
    """Rows of zeros below, up to this rank."""
    return functional.pad(rows, (0, 0, 0, rank - len(rows)))
