"""Groups of clients that grow: clusters of the first uploads, then the nearest for latecomers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from fedalt.methods.clustering import Signal, cluster, distances, has_direction
from fedalt.methods.contract import Ledger, Message
from fedalt.methods.mean import Totals


@dataclass(frozen=True)
class Grouping:
    """How groups are found: what is compared, at most how many, and from which silhouette on."""

    signal: Signal
    most: int
    least_silhouette: float | None

    def sort(
        self, replies: Iterable[tuple[str, Message]], groups: Mapping[str, int]
    ) -> tuple[Totals, dict[str, Message]]:
        """Sums of the uploads of each group, and the uploads by which others can be grouped.

        Those without a direction cannot.
        """
        totals, newcomers = Totals(), dict[str, Message]()
        for client_id, upload in replies:
            if client_id in groups:
                totals.add(groups[client_id], upload)
            elif upload.tree and has_direction(upload.tree, self.signal):
                newcomers[client_id] = upload
        return totals, newcomers

    def assign(
        self, newcomers: Mapping[str, Message], groups: Mapping[str, int], members: Ledger
    ) -> dict[str, int]:
        """The groups with the newcomers in them: clusters of these, or the nearest group there is.

        A group is as far from a newcomer as its members' uploads are in the mean.
        """
        if groups:
            uploads = newcomers.items()
            return {
                **groups,
                **{k: self._nearest(upload, groups, members) for k, upload in uploads},
            }
        if not newcomers:
            return {}
        far = distances({k: upload.tree for k, upload in newcomers.items()}, self.signal)
        labels = cluster(far, self.most, self.least_silhouette).labels
        return dict(zip(newcomers, labels, strict=True))

    def _nearest(self, upload: Message, groups: Mapping[str, int], members: Ledger) -> int:
        far: dict[int, list[float]] = {}
        for member in members.clients():
            pair = {"": upload.tree, member: members[member].tree}
            far.setdefault(groups[member], []).append(float(distances(pair, self.signal)[0, 1]))
        return min(far, key=lambda group: (fmean(far[group]), group))
