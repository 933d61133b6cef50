"""Groups of clients by the subspaces that their B span: distances, kernel, spectral clusters."""

from collections.abc import Iterable, Mapping
from statistics import fmean

import torch
from torch import Tensor

from fedalt.core.tree import Tree, add, scale
from fedalt.methods.clustering import has_direction, numbered


def remember(bases: dict[str, Tree], client: str, adapter: Tree, memory: float) -> None:
    """Put an adapter's B, of length 1 on every site, in the place of the client's basis.

    The one before counts `memory` in [0, 1). A B that is zero on a site spans nothing and is not
    remembered; nor is an empty adapter.
    """
    if adapter and has_direction(adapter, "B"):
        outer = {name: t / t.norm() for name, t in adapter.items() if name.factor == "B"}
        before = bases.get(client, outer)
        bases[client] = add(scale(before, memory), scale(outer, 1 - memory))


def subspace_distances(bases: Mapping[str, Tree]) -> Tensor:
    """Mean over sites of 1 - |U_i^T U_j|_F^2 / r, for each pair of clients: (N, N), float64.

    U_i (d_out, r) are the left singular vectors of client i's B: the mean squared cosine of the
    principal angles between two subspaces, 0 where they are one, 1 where they are at right angles.
    """
    trees = list(bases.values())
    far = torch.zeros(len(trees), len(trees), dtype=torch.float64)
    for name in trees[0]:
        b = torch.stack([tree[name].double() for tree in trees])
        u = torch.linalg.svd(b, full_matrices=False).U
        count, _, rank = u.shape
        columns = u.mT.flatten(0, 1)
        cosines = (columns @ columns.T).square()
        far += 1 - cosines.reshape(count, rank, count, rank).sum((1, 3)) / rank
    return (far / len(trees[0])).clamp_min(0).fill_diagonal_(0)


def spectral_clusters(far: Tensor, most: int) -> tuple[int, ...]:
    """The cluster of each client by distances `far` (N, N): 2 to `most` of them, by the eigengap.

    The affinity is a Gaussian kernel, exp(-far^2 / 2 sigma^2), sigma the median distance of two
    clients. So wide a kernel cannot say that there is one cluster. There is one where there are
    fewer than three clients, where `most` is 1, and where most distances are 0.
    """
    from sklearn.cluster import SpectralClustering  # takes a second to import

    clients = len(far)
    others = far[~torch.eye(clients, dtype=torch.bool)]
    if clients < 3 or most == 1 or not (sigma := torch.quantile(others, 0.5)):
        return (0,) * clients
    near = torch.exp(-far.square() / (2 * sigma.square()))
    model = SpectralClustering(
        eigengap(near, min(most, clients - 1)),
        affinity="precomputed",
        assign_labels="cluster_qr",
        random_state=0,
    )
    return numbered(model.fit_predict(near.numpy()).tolist(), far)


def eigengap(near: Tensor, most: int) -> int:
    """The k from 2 to `most` behind whose eigenvalue of the normalised Laplacian is the widest gap.

    `near` (N, N) are affinities, `most` is below N; the eigenvalues rise from 0.
    """
    root = near.sum(1).rsqrt()
    values = torch.linalg.eigvalsh(torch.eye(len(near)) - root[:, None] * near * root)
    return 2 + int(values[1 : most + 1].diff().argmax())


def grouped(bases: Mapping[str, Tree], groups: Mapping[str, int], most: int) -> Mapping[str, int]:
    """The groups with all clients in them that have a basis.

    If there are no groups yet they are spectral clusters. Else who has none joins the one whose
    members are nearest on average; all members have a basis.
    """
    if bases.keys() <= groups.keys():
        return groups
    far = subspace_distances(bases)
    if not groups:
        return dict(zip(bases, spectral_clusters(far, most), strict=True))
    at = {client: index for index, client in enumerate(bases)}
    joined = dict(groups)
    for client in bases.keys() - groups.keys():
        gaps: dict[int, list[float]] = {}
        for member, group in groups.items():
            gaps.setdefault(group, []).append(float(far[at[client], at[member]]))
        joined[client] = min(gaps, key=lambda group: (fmean(gaps[group]), group))
    return joined


def overlap(slot: str, others: Iterable[str], weight: float, tree: Tree) -> Tensor:
    """The sum over sites and other slots of |B_other^T B_slot|_F^2, times a weight: a penalty."""
    parts = [
        (tree[name._replace(slot=other)].to(b).mT @ b).square().sum()
        for name, b in tree.items()
        if name.factor == "B" and name.slot == slot
        for other in others
    ]
    return weight * torch.stack(parts).sum()
