"""What many clients are sent of their kin: sums of products, cut to the rank of an adapter.

Clients with the same kin, themselves included, are done together. With the adapters of K kin side
by side, B = (B_1 .. B_K) and A = (A_1; ..; A_K), and factors R^T R = B^T B and S^T S = A A^T of
their (K r, K r) Gram matrices, the sum that one client is sent is

    sum_j w_j B_j A_j = B diag(w) A = Q_B (R diag(w) S^T) Q_A^T,   B = Q_B R,   A^T = Q_A S

Only its singular value decomposition, of a (K r, K r) matrix, is each client's own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedalt.core.tree import Name, Tree
from fedalt.methods.kin import Weights


def sums_of_products(
    adapters: Mapping[str, Tree], weights: Weights, target: str, rank: int
) -> dict[str, Tree]:
    """For each client sum_j w_j B_j A_j on every site, cut to its `rank` strongest directions.

    `weights` are, by client, of the adapters in its sum, which are all of one rank; sums are in
    slot `target`. Directions and strengths are found in float64, before the cut. All of the
    strength lies in B; where there are fewer directions, rows and columns of zeros fill up.
    """
    sums: dict[str, Tree] = {client: {} for client in weights}
    together: dict[tuple[str, ...], list[str]] = {}
    for client, of in weights.items():
        together.setdefault(tuple(sorted(of)), []).append(client)
    for members, clients in together.items():
        rows = [[weights[client][member] for member in members] for client in clients]
        rows_of = torch.tensor(rows, dtype=torch.float64)
        distinct, which = rows_of.unique(dim=0, return_inverse=True)
        for name in (name for name in adapters[members[0]] if name.factor == "B"):
            a_name = name._replace(factor="A")
            b = torch.cat([adapters[member][name] for member in members], 1)
            a = torch.cat([adapters[member][a_name] for member in members])
            left, right = _cut_sums(b, a, distinct, rank)
            for client, at in zip(clients, which.tolist(), strict=True):
                sums[client][Name(name.site, target, "A")] = right[at].clone()
                sums[client][Name(name.site, target, "B")] = left[at].clone()
    return sums


def _cut_sums(b: Tensor, a: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors B (N, d_out, rank) and A (N, rank, d_in) of B diag(w) A for N rows of weights.

    B is (d_out, K r), A (K r, d_in), weights (N, K). The largest element of every row of the second
    factor is positive, so that signs do not depend on the order of the clients.
    """
    weights = weights.repeat_interleave(len(a) // weights.shape[1], 1)
    (root_b, inverse_b), (root_a, inverse_a) = _roots(b.T), _roots(a)
    u, s, v = torch.linalg.svd((root_b * weights[:, None]) @ root_a.T, full_matrices=False)
    u, s, v = u[..., :rank], s[:, :rank], v[:, :rank]
    s = s * (s > torch.finfo(torch.float32).eps * s[:, :1])
    missing = rank - s.shape[1]
    left = b @ pad(inverse_b @ (u * s[:, None]), (0, missing)).float()
    right = pad((s.sign()[..., None] * v) @ inverse_a.T, (0, 0, 0, missing)).float() @ a
    signs = right.gather(2, right.abs().argmax(2, keepdim=True)).sign()
    return left.mul_(signs.mT), right.mul_(signs)


def _roots(rows: Tensor) -> tuple[Tensor, Tensor]:
    """R (p, n) with R^T R = X X^T of n rows, and its pseudoinverse; p directions are not 0."""
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > len(rows) * torch.finfo(rows.dtype).eps * values[-1]
    vectors, root = vectors[:, kept], values[kept].sqrt()
    return (vectors * root).T, vectors / root
