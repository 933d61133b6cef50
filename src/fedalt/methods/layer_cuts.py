"""One tree of clients, cut for every layer of the model at a height of its own."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedalt.core.tree import Tree
from fedalt.methods.clustering import numbered
from fedalt.methods.contract import Ledger

Groups = Mapping[str, Mapping[str, int]]  # by layer and client


def layer_of(site: str) -> str:
    """The path of a site up to its first number, such as model.layers.3, or all of it."""
    parts = site.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: at + 1])


def layers_of(sites: Iterable[str]) -> list[str]:
    """The layers of these sites, from the input to the output: by name, numbers by size.

    A decoder stands behind its encoder.
    """

    def order(layer: str) -> list[tuple[int, bool, str]]:
        return [
            (int(part), False, "") if part.isdigit() else (-1, part == "decoder", part)
            for part in layer.split(".")
        ]

    return sorted({layer_of(site) for site in sites}, key=order)


def layer_distances(adapters: Sequence[Tree]) -> dict[str, Tensor]:
    """Of every layer, in order, |B_i - B_j|_F for each pair of clients: (N, N), float64.

    The B of all sites of a layer are one vector.
    """
    outer = [name for name in adapters[0] if name.factor == "B"]
    squares: dict[str, Tensor] = {
        layer: torch.tensor(0) for layer in layers_of(n[0] for n in outer)
    }
    for name in outer:
        flat = torch.stack([adapter[name].double().flatten() for adapter in adapters])
        layer = layer_of(name.site)
        squares[layer] = (
            squares[layer]
            + torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
        )
    return {layer: square.sqrt() for layer, square in squares.items()}


def cuts(far: Mapping[str, Tensor], width: int, one_group: float) -> dict[str, tuple[int, ...]]:
    """Each layer's groups: cuts of one tree, never coarser than that of the layer before.

    The tree is the average linkage of the mean of all layers' distances. A layer that follows one
    of c groups has c to c + `width` - 1, those whose silhouette in the layer's own distances is the
    best, first of equals; one group counts as much as a silhouette of `one_group`.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage  # with sklearn a second to import
    from scipy.spatial.distance import squareform
    from sklearn.metrics import silhouette_score

    mean = torch.stack(list(far.values())).mean(0)
    clients, count = len(mean), 1
    if clients < 3:
        return dict.fromkeys(far, (0,) * clients)
    merges = linkage(squareform(mean.numpy(), checks=False), "average")
    levels = {c: cut_tree(merges, c).ravel().tolist() for c in range(1, clients)}
    found = {}
    for layer, of_layer in far.items():
        scores = {
            c: one_group
            if c == 1
            else float(silhouette_score(of_layer.numpy(), levels[c], metric="precomputed"))
            for c in range(count, min(clients, count + width))
        }
        count = max(scores, key=lambda c: scores[c])
        found[layer] = numbered(levels[count], mean)
    return found


def grown(groups: Groups, uploads: Ledger, width: int, one_group: float) -> Groups:
    """The groups with all clients in them that have an upload in the ledger.

    If there are no groups yet they are cuts of the clients' tree. Else who has none joins, in every
    layer, the group of the client whose B is nearest in the mean over layers.
    """
    clients = uploads.clients()
    known = [client for client in clients if any(client in of for of in groups.values())]
    newcomers = [client for client in clients if client not in known]
    if not newcomers:
        return groups
    adapters = {client: uploads[client].tree for client in clients}
    far = layer_distances(list(adapters.values()))
    if not known:
        found = cuts(far, width, one_group)
        return {layer: dict(zip(adapters, of, strict=True)) for layer, of in found.items()}
    mean = dict(zip(adapters, torch.stack(list(far.values())).mean(0).tolist(), strict=True))
    at = {client: index for index, client in enumerate(adapters)}
    nearest = {k: min(known, key=lambda other: (mean[k][at[other]], other)) for k in newcomers}
    return {
        layer: {**of_layer, **{client: of_layer[nearest[client]] for client in newcomers}}
        for layer, of_layer in groups.items()
    }
