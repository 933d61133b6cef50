"""Who observes a run while it goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # trackers do without torch
    from fedalt.engine.schedule import Event, Line


class Observer(Protocol):
    """Somebody who observes a run: its events, and its record as it is written."""

    def on_event(self, event: "Event") -> None:
        """Something moved on."""

    def on_record(self, line: "Line") -> None:
        """A line was added to rounds.jsonl."""


@dataclass(frozen=True)
class Observers:
    """Several observers as one, or nobody."""

    members: Sequence[Observer] = ()

    def on_event(self, event: "Event") -> None:
        """Pass it on to each."""
        for observer in self.members:
            observer.on_event(event)

    def on_record(self, line: "Line") -> None:
        """Pass it on to each."""
        for observer in self.members:
            observer.on_record(line)
