"""Who observes a run while it goes on."""

from dataclasses import dataclass
from typing import Protocol

from fedalt.engine.schedule import Event, Line


class Observer(Protocol):
    """Somebody who observes a run: its events, and its record as it is written."""

    def on_event(self, event: Event) -> None:
        """Something moved on."""

    def on_record(self, line: Line) -> None:
        """A line was added to rounds.jsonl."""


@dataclass(frozen=True)
class NullObserver:
    """An observer who does nothing."""

    def on_event(self, event: Event) -> None:
        """Ignore it."""

    def on_record(self, line: Line) -> None:
        """Ignore it."""
