"""Signs of life of a run: bars on a terminal, one plain line per round everywhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from fedalt.cli.output import console, note
from fedalt.core.foreign import shown
from fedalt.engine.members import Members
from fedalt.engine.schedule import Event, Line
from fedalt.report.live_drawing import shown_time
from fedalt.runs.observer import Observer, Observers
from fedalt.runs.setup import Prepared

_ROOM = 80  # columns that bars take; where there are fewer, lines say as much


@dataclass(frozen=True)
class RoundLines:
    """One line per round: the mean losses of its columns, its seconds, the time left."""

    rounds: int
    say: Callable[[str], None]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def on_event(self, event: Event) -> None:
        """Say that testing begins, which may take a while, and whose upload was refused."""
        if event.what == "test" and event.done == 1:
            after = f" after round {event.round + 1}/{self.rounds}" if event.round >= 0 else ""
            self.say(f"testing {event.column}{after}")
        if event.what == "refuse":
            who = f"upload of client {event.client_id!r} rejected: " if event.client_id else ""
            reason = shown(event.reason)
            self.say(f"warning: round {event.round + 1}/{self.rounds}: {who}{reason}")

    def on_record(self, line: Line) -> None:
        """Collect a round's lines and say them in one."""
        self.lines.append(dict(line))
        if line["kind"] == "round":
            self.say(self._round(self.lines[-1]))
            self.lines.clear()

    def _round(self, end: dict[str, Any]) -> str:
        parts = [f"round {end['round'] + 1}/{self.rounds}:"]
        for kind, name in (("train", "loss"), ("score", "validation loss")):
            means = [
                f"{column} {fmean(losses):.3f}"
                for column in ("own", "local")
                if (losses := self._losses(kind, column))
            ]
            if means:
                parts.append(f"{name} {', '.join(means)};")
        left = end["seconds"] * (self.rounds - 1 - end["round"])
        parts.append(f"{shown_time(end['seconds'])}, {shown_time(left)} left")
        return " ".join(parts)

    def _losses(self, kind: str, column: str) -> list[float]:
        return [
            line["metrics"]["loss"]
            for line in self.lines
            if line["kind"] == kind and line["column"] == column
        ]


@dataclass(frozen=True)
class Bars:
    """Two bars: the clients of all rounds with the time left, and what is going on right now."""

    bars: Progress
    total: TaskID
    now: TaskID
    rounds: int
    trained: set[tuple[str, str]] = field(default_factory=set)  # clients and columns of this round

    def on_event(self, event: Event) -> None:
        """Move the bars on."""
        if event.what == "refuse":
            return
        doing = {"train": "training", "validate": "validating", "test": "testing"}[event.what]
        client = f"{doing} {event.column}, {event.client_id}"
        if event.loss is not None:
            client += f", loss {event.loss:.3f}"
        self.bars.update(self.now, description=client, completed=event.done, total=event.of)
        if event.round >= 0:  # the base model's own score belongs to none
            self.bars.update(self.total, description=f"round {event.round + 1}/{self.rounds}")
        if event.what == "train" and event.done == event.of:
            self._count(event.client_id, event.column)

    def on_record(self, line: Line) -> None:
        """Training is recorded once all of the cohort have trained."""
        if line["kind"] == "train":
            self._count(str(line["client"]), str(line["column"]))
        if line["kind"] == "round":
            self.trained.clear()

    def _count(self, client_id: str, column: str) -> None:
        """A client has trained; methods that order several fits are counted after the first."""
        if (client_id, column) not in self.trained:
            self.trained.add((client_id, column))
            self.bars.advance(self.total)


@contextmanager
def watching(prepared: Prepared, *, done: int = 0, quiet: bool = False) -> Iterator[Observer]:
    """Whoever should watch this run of which `done` rounds are done already."""
    with ExitStack() as open_:
        observers: list[Observer] = []
        rounds = prepared.parts.settings.rounds.rounds
        if not quiet and sys.stderr.isatty() and console(stderr=True).width >= _ROOM:
            bars = open_.enter_context(_bars())
            total, trained = _trainings(prepared, rounds), _trainings(prepared, done)
            at = bars.add_task("begins", total=total, completed=trained)
            observers.append(Bars(bars, at, bars.add_task("", total=None), rounds))
            observers.append(RoundLines(rounds, bars.console.print))
        elif not quiet:
            observers.append(RoundLines(rounds, note))
        yield Observers(observers)


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(width=44, no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )


def _trainings(prepared: Prepared, rounds: int) -> int:
    """Trainings of a client in so many rounds from the first on: cohorts times arms."""
    settings = prepared.parts.settings
    members = Members(prepared.task.clients, settings.clients)
    cohorts = [settings.rounds.cohort(members.at(at), at, settings.seed) for at in range(rounds)]
    return sum(map(len, cohorts)) * len(prepared.parts.arms)
