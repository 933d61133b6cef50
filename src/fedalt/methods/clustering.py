"""Groups of clients, found in what they have trained: distances, average linkage, silhouette."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Literal

import torch
from torch import Tensor

from fedalt.core.tree import Name, Tree

Signal = Literal["B", "BA"]

_BLOCK: Final = 128  # rows of a Gram matrix that are computed at a time


@dataclass(frozen=True)
class Clustering:
    """The cluster of each client, from 0 without gaps, and the silhouettes it was chosen by.

    Clusters are numbered by size, largest first, and those of one size by how near their members
    are to everyone: what clients are called decides nothing. `silhouettes` are by number of
    clusters.
    """

    labels: tuple[int, ...]
    silhouettes: Mapping[int, float]

    @property
    def clusters(self) -> int:
        """How many there are."""
        return max(self.labels) + 1


def distances(adapters: Mapping[str, Tree], signal: Signal) -> Tensor:
    """Mean over sites of 1 - cosine, for each pair of clients: (N, N), float64, zero diagonal.

    `adapters` are of one rank and one slot, by client. Compared is B as one vector, or the product
    B A, of which only traces of (rank, rank) matrices are computed. Clients that share no first A
    have no common basis, and only "BA" can compare them. Raises ValueError where a client's B (or
    B A) is zero on a site: a zero vector has no direction.
    """
    cosines = []
    for name, of_site in _cosines(list(adapters.values()), signal):
        if (nowhere := of_site.diagonal().isnan()).any():
            client_id = list(adapters)[int(nowhere.nonzero()[0])]
            raise ValueError(
                f"{signal} of client {client_id!r} is zero on {name.site}: it was not trained, "
                "and by its direction no group can be found for the client"
            )
        cosines.append(of_site)
    return (1 - torch.stack(cosines).mean(0)).clamp_min(0).fill_diagonal_(0)


def mean_cosines(adapters: Mapping[str, Tree], signal: Signal) -> Tensor:
    """Mean over sites of the cosine, for each pair of clients: (N, N), float64.

    The rows and columns of a client whose B (or B A) is zero on a site are NaN. For the rest see
    `distances`.
    """
    cosines = [of_site for _, of_site in _cosines(list(adapters.values()), signal)]
    return torch.stack(cosines).mean(0)


def has_direction(adapter: Tree, signal: Signal) -> bool:
    """Whether `distances` can compare an adapter: its B (or B A) is finite, and zero on no site."""
    outer = [name for name in adapter if name.factor == "B"]
    return all(0 < _products([adapter], name, signal).item() < inf for name in outer)


def cluster(far: Tensor, most: int, least_silhouette: float | None = None) -> Clustering:
    """Average-linkage clusters, of 2 to `most` those with the best silhouette, first of equals.

    `far` (N, N) are distances. All clients are one cluster where there are fewer than three, where
    `most` is 1, or where the best silhouette is below `least_silhouette`: a silhouette itself
    cannot say that there is one cluster.
    """
    from sklearn.cluster import AgglomerativeClustering  # takes a second to import
    from sklearn.metrics import silhouette_score

    clients = len(far)
    labels: dict[int, list[int]] = {}
    silhouettes: dict[int, float] = {}
    for clusters in range(2, min(most, clients - 1) + 1):
        linkage = AgglomerativeClustering(clusters, metric="precomputed", linkage="average")
        labels[clusters] = linkage.fit_predict(far.numpy()).tolist()
        silhouettes[clusters] = float(
            silhouette_score(far.numpy(), labels[clusters], metric="precomputed")
        )
    best = max(silhouettes, key=lambda clusters: silhouettes[clusters], default=1)
    if best == 1 or (least_silhouette is not None and silhouettes[best] < least_silhouette):
        return Clustering((0,) * clients, silhouettes)
    return Clustering(numbered(labels[best], far), silhouettes)


def spread_out(far: Tensor, most: int) -> list[int]:
    """Which of the clients, at most so many, lie far apart: (N, N) distances `far`.

    The first is the one that is nearest to all, each further one the one farthest from those before
    it (Gonzalez, "Clustering to Minimize the Maximum Intercluster Distance", 1985). Fewer where the
    next one would be the same as one before, to the precision of float32.
    """
    chosen = [int(far.sum(1).argmin())]
    same = torch.finfo(torch.float32).eps
    while len(chosen) < most and float((gaps := far[chosen].amin(0)).max()) > same:
        chosen.append(int(gaps.argmax()))
    return chosen


def numbered(labels: Sequence[int], far: Tensor) -> tuple[int, ...]:
    """The labels, given anew in an order that depends on sizes and distances alone."""

    def rank(label: int) -> tuple[int, float]:
        members = [index for index, given in enumerate(labels) if given == label]
        return -len(members), float(far[members].sum())

    order = sorted(dict.fromkeys(labels), key=rank)
    return tuple(order.index(label) for label in labels)


def _cosines(trees: Sequence[Tree], signal: Signal) -> Iterator[tuple[Name, Tensor]]:
    for name in (name for name in trees[0] if name.factor == "B"):
        products = _products(trees, name, signal)
        norms = products.diagonal().sqrt()
        yield name, products / norms.outer(norms)


def _products(trees: Sequence[Tree], outer: Name, signal: Signal) -> Tensor:
    """Inner products of all clients' B, or B A, on one site: (N, N), float64.

    <B_i A_i, B_j A_j> = tr(A_i A_j^T B_j^T B_i): two (rank, rank) blocks, multiplied and summed.
    Each client's factors are scaled to a largest element of 1, which changes no cosine and keeps
    squares within float32; what is zero becomes NaN.
    """
    b = _scaled([tree[outer] for tree in trees])
    if signal == "B":
        return _gram(b.flatten(1))
    a = _scaled([tree[outer._replace(factor="A")] for tree in trees])
    count, rank, _ = a.shape
    blocks = _gram(b.mT.flatten(0, 1)) * _gram(a.flatten(0, 1))
    return blocks.reshape(count, rank, count, rank).sum((1, 3))


def _scaled(matrices: Sequence[Tensor]) -> Tensor:
    """Stacked, each divided by its largest element: (N, rows, columns), float32."""
    stacked = torch.stack(list(matrices))
    return stacked.div_(torch.linalg.vector_norm(stacked, torch.inf, (1, 2), keepdim=True))


def _gram(rows: Tensor) -> Tensor:
    """X X^T in float64; of many rows only the half is computed of which the other is a mirror."""
    gram = rows.new_empty(len(rows), len(rows), dtype=torch.float64)
    for at in range(0, len(rows), _BLOCK):
        here = slice(at, at + _BLOCK)
        part = rows[here] @ rows[at:].T
        gram[here, at:], gram[at:, here] = part, part.T
    return gram
