"""How calls reach clients and answers come back; whoever carries them knows who is who."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Lost:
    """A call that will not be answered any more, and why: the client may be called again."""

    reason: str


class Transport(Protocol):
    """A connection to all clients, which says truthfully which client an answer came from."""

    def online(self) -> frozenset[str]:
        """The clients that can be called now."""

    def send(self, calls: Iterable[tuple[str, bytes]]) -> None:
        """Call clients. Each answers its calls one after the other."""

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        """What has come since the last look; waits a moment where nothing has."""
