"""How alike clients' individual adapters are, as the record has it: cosines, and a tree of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalt.report.records import Record, Rows, short
from fedalt.runs.record import summary_in


@dataclass(frozen=True)
class Similarity:
    """Clients in the order of the tree's leaves, and their cosines in that order.

    `branches` are the tree's lines as points: `place` counts leaves from 0, `distance` is
    1 - cosine. For the rest see `runs.record.Similarity`.
    """

    column: str
    round: int
    signal: str
    names: Sequence[str]
    cosines: Sequence[Sequence[float]]
    branches: Rows
    groups: Mapping[str, int]


def similarity(record: Record) -> Similarity | str:
    """The similarity of those clients that have not left, or why there is none."""
    from scipy.cluster.hierarchy import dendrogram, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    summary = summary_in(record.lines)
    if summary is None:
        return (
            "it is computed once a run has been tested, and this one has no record of it; "
            f"`fedalt resume {record.folder.path}` adds what is missing"
        )
    known = summary["similarity"]
    if isinstance(known, str):
        return known
    there = [at for at, name in enumerate(known["clients"]) if name not in record.folder.left()]
    if len(there) < 2:
        return "all clients but one have left"
    far = squareform(known["distances"])[there][:, there]
    condensed = squareform(far)
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    drawn = dendrogram(tree, no_plot=True)
    leaves: list[int] = drawn["leaves"]
    names = [known["clients"][there[leaf]] for leaf in leaves]
    groups = {name: known["groups"][name] for name in names if name in known["groups"]}
    branches = [
        {
            "branch": branch,
            "step": step,
            "place": (place - 5) / 10,
            "distance": short(distance),
            "height": short(max(distances)),
        }
        for branch, (places, distances) in enumerate(
            zip(drawn["icoord"], drawn["dcoord"], strict=True)
        )
        for step, (place, distance) in enumerate(zip(places, distances, strict=True))
    ]
    return Similarity(
        column=known["column"],
        round=known["round"] + 1,
        signal=known["signal"],
        names=[f"{name} · group {groups[name]}" if name in groups else name for name in names],
        cosines=[[short(1 - far[i, j]) for j in leaves] for i in leaves],
        branches=branches,
        groups=groups,
    )
