"""How far apart clients' own adapters are, by the directions of their products B A."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedalt.core.codec import fields_of
from fedalt.core.tree import Tree, merge
from fedalt.engine.schedule import Progress
from fedalt.methods.clustering import Signal, distances, has_direction
from fedalt.methods.contract import AnyMethod
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import RunFolder
from fedalt.runs.record import Similarity
from fedalt.runs.settings import Settings
from fedalt.runs.setup import arms_of

MOST_BYTES = 4_000_000_000  # of states: reading more would take long and much memory


def similarity_of(folder: RunFolder, settings: Settings, progress: Progress) -> Similarity | str:
    """The distances between a run's clients after the tested round, or why there are none."""
    clients = sorted(folder.facts()["clients"].keys() - folder.left())
    for arm in arms_of(settings):
        round_ = progress.chosen(arm.column, settings.rounds.select)
        states = folder.states(arm.column, round_ + 1)
        if _size(states, clients) > MOST_BYTES:
            return f"the states of the clients are more than {MOST_BYTES / 1e9:.0f} GB"
        kept = _adapters(states, clients, arm.method)
        whole = all(
            name._replace(factor="A") in tree
            for tree in kept.values()
            for name in tree
            if name.factor == "B"
        )
        signal: Signal = "BA" if whole else "B"
        adapters = _comparable(kept, signal)
        if len(adapters) < 2:
            continue
        upper = torch.triu_indices(len(adapters), len(adapters), 1)
        far = distances(adapters, signal)[upper.unbind()]
        return {
            "column": arm.column,
            "round": round_,
            "signal": signal,
            "clients": list(adapters),
            "distances": [float(f"{distance:.6g}") for distance in far.tolist()],
            "groups": _groups(states, arm.method),
        }
    return "no two clients keep a trained adapter of their own"


def _size(states: FileStates, clients: Sequence[str]) -> int:
    """Bytes of the clients' state files, of all rounds that are kept."""
    files = (
        path for client_id in clients for path in (states.folder / "clients" / client_id).glob("*")
    )
    return sum(path.stat().st_size for path in files)


def _adapters(states: FileStates, clients: Sequence[str], method: AnyMethod) -> dict[str, Tree]:
    """The pairs in clients' states; B alone where a client keeps no A."""
    kept: dict[str, Tree] = {}
    for client_id in clients:
        state: Any = states.get(f"clients/{client_id}", method.client_state)
        if state is not None:
            trees = (getattr(state, name) for name in fields_of(type(state), Tree))
            kept[client_id] = merge(*(_pairs(tree) for tree in trees))
    return kept


def _comparable(kept: Mapping[str, Tree], signal: Signal) -> dict[str, Tree]:
    """Those that are trained; none where they differ in shape, or not at all."""
    trained = {
        client_id: tree
        for client_id, tree in kept.items()
        if any(name.factor == "B" for name in tree) and has_direction(tree, signal)
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
    """The groups that a server has made of its clients, if its state has some."""
    server: Any = states.get("server", method.server_state)
    numbers = fields_of(method.server_state, Mapping[str, int])
    named = [name for name in numbers if name in ("clusters", "groups")]
    return {} if server is None or not named else dict(getattr(server, named[0]))
