"""How alike clients' individual adapters are: cosines of their products B A, and a tree of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedalt.core.codec import fields_of
from fedalt.core.tree import Tree, merge
from fedalt.methods.clustering import Signal, distances
from fedalt.methods.contract import AnyMethod
from fedalt.methods.local import LocalOnly
from fedalt.report.records import Record, Rows, short
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.settings import read_settings

MOST_BYTES = 4_000_000_000  # of states: reading more would take long and much memory


@dataclass(frozen=True)
class Similarity:
    """Clients in the order of the tree's leaves, and their cosines in that order, mean over sites.

    `branches` are the tree's lines as points: `place` counts leaves from 0, `distance` is
    1 - cosine. `column` tells whose adapters they are, "own" or the yardstick's "local"; `signal`
    what was compared; `groups` the group of each client, where the method makes groups.
    """

    column: str
    round: int
    signal: Signal
    names: Sequence[str]
    cosines: Sequence[Sequence[float]]
    branches: Rows
    groups: Mapping[str, int]


def similarity(record: Record) -> Similarity | str:
    """The similarity of a run's clients after the round that was tested, or why there is none."""
    settings = read_settings(record.folder.path / "settings.toml")
    arms: dict[str, AnyMethod] = {"own": settings.method, "local": LocalOnly()}
    for column, method in arms.items():
        round_ = _round(record, column)
        if round_ is None:
            continue
        states = record.folder.states(column, round_ + 1)
        clients = _clients(record)
        if _size(states, clients) > MOST_BYTES:
            return f"the states of the clients are more than {MOST_BYTES / 1e9:.0f} GB"
        adapters = _adapters(states, clients, method)
        if len(adapters) < 2:
            continue
        whole = all(
            name._replace(factor="A") in tree
            for tree in adapters.values()
            for name in tree
            if name.factor == "B"
        )
        signal: Signal = "BA" if whole else "B"
        groups = _groups(states, method)
        return _sorted(
            column, round_, signal, 1 - distances(adapters, signal), list(adapters), groups
        )
    return "no two clients keep a trained adapter of their own"


def _round(record: Record, column: str) -> int | None:
    """The round a column was tested at, or else the last one that it was trained in."""
    tested = [
        line["round"]
        for line in record.of("score")
        if line["split"] == "test" and line["column"] == column
    ]
    trained = [line["round"] for line in record.of("train") if line["column"] == column]
    return max(tested or trained, default=None)


def _clients(record: Record) -> list[str]:
    known = {*record.facts.get("clients", {}), *record.facts.get("joined", {})}
    return sorted(known - record.folder.left())


def _size(states: FileStates, clients: Sequence[str]) -> int:
    """Bytes of the clients' state files, of all rounds that are kept."""
    files = (
        path for client_id in clients for path in (states.folder / "clients" / client_id).glob("*")
    )
    return sum(path.stat().st_size for path in files)


def _adapters(states: FileStates, clients: Sequence[str], method: AnyMethod) -> dict[str, Tree]:
    """The pairs in clients' states that are trained and not the same for all.

    B alone where a client keeps no A.
    """
    kept: dict[str, Tree] = {}
    for client_id in clients:
        state: Any = states.get(f"clients/{client_id}", method.client_state)
        if state is not None:
            trees = (getattr(state, name) for name in fields_of(type(state), Tree))
            kept[client_id] = merge(*(_pairs(tree) for tree in trees))
    trained = {
        client_id: tree
        for client_id, tree in kept.items()
        if any(name.factor == "B" for name in tree)
        and all(bool(tensor.any()) for name, tensor in tree.items() if name.factor == "B")
    }
    first = next(iter(trained.values()), {})
    same = all(
        tree.keys() == first.keys() and all(torch.equal(tree[name], first[name]) for name in first)
        for tree in trained.values()
    )
    fits = all(
        tree.keys() == first.keys() and all(tree[n].shape == first[n].shape for n in first)
        for tree in trained.values()
    )
    return {} if same or not fits else trained


def _pairs(tree: Tree) -> Tree:
    return {name: tensor for name, tensor in tree.items() if name.factor in ("A", "B")}


def _groups(states: FileStates, method: AnyMethod) -> dict[str, int]:
    """What a server's state calls a number for each client: the groups it has made of them."""
    server: Any = states.get("server", method.server_state)
    named = fields_of(method.server_state, Mapping[str, int])
    return {} if server is None or not named else dict(getattr(server, named[0]))


def _sorted(
    column: str,
    round_: int,
    signal: Signal,
    cosines: torch.Tensor,
    clients: Sequence[str],
    groups: Mapping[str, int],
) -> Similarity:
    """Clients in the order of an average-linkage tree over 1 - cosine."""
    from scipy.cluster.hierarchy import dendrogram, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    far = squareform((1 - cosines).clamp_min(0).numpy(), checks=False)
    tree = optimal_leaf_ordering(linkage(far, "average"), far)
    drawn = dendrogram(tree, no_plot=True)
    order: list[int] = drawn["leaves"]

    def shown(index: int) -> str:
        name = clients[index]
        return f"{name} · group {groups[name]}" if name in groups else name

    branches = [
        {
            "branch": branch,
            "step": step,
            "place": (place - 5) / 10,
            "distance": short(distance),
            "height": short(max(distances_)),
        }
        for branch, (places, distances_) in enumerate(
            zip(drawn["icoord"], drawn["dcoord"], strict=True)
        )
        for step, (place, distance) in enumerate(zip(places, distances_, strict=True))
    ]
    return Similarity(
        column=column,
        round=round_,
        signal=signal,
        names=[shown(index) for index in order],
        cosines=[[short(float(cosines[i, j])) for j in order] for i in order],
        branches=branches,
        groups={
            clients[index]: groups[clients[index]] for index in order if clients[index] in groups
        },
    )
