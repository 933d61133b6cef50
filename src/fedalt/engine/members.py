"""Who takes part in which round, where clients join late or leave."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedalt.core.settings import Stay


@dataclass(frozen=True)
class Members:
    """All clients that ever take part; `stays` are those that are not there from first to last."""

    clients: Sequence[str]
    stays: Mapping[str, Stay] = field(default_factory=dict)

    def at(self, round_: int) -> list[str]:
        """Who takes part in a round, in the order of the clients."""
        everyone = Stay()
        return [who for who in self.clients if self.stays.get(who, everyone).includes(round_)]

    def without(self, left: Collection[str]) -> "Members":
        """The same without clients that are gone altogether."""
        return Members([who for who in self.clients if who not in left], self.stays)

    def leaving(self, round_: int) -> list[str]:
        """Whose part is taken out of the server's state when a round begins."""
        stays = self.stays.items()
        return sorted(who for who, stay in stays if who in self.clients and stay.leaves == round_)

    def changed(self, round_: int) -> int:
        """The last round up to this one that began with other clients than the one before; or 0.

        Mean losses of rounds before and after it are of different clients.
        """
        changes = [at for stay in self.stays.values() for at in (stay.joins, stay.leaves)]
        return max((at for at in changes if at is not None and at <= round_), default=0)
