"""Who does the work of a run: groups of clients to train and to score, shared out in order."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from fedalt.engine.schedule import Column, HeldOut, Line

T = TypeVar("T")


@dataclass(frozen=True)
class Train:
    """Train clients in a round, by the arm of a column."""

    column: Column
    round: int


@dataclass(frozen=True)
class Score:
    """Score what clients serve after a round; `whole` and `show` as in `Run.score`."""

    column: Column
    round: int
    split: HeldOut
    whole: bool
    show: bool


Job = Train | Score


@dataclass(frozen=True)
class Scored:
    """A client's mean loss, and lines as JSON: for the run's record, and of telling examples."""

    TAG: ClassVar = "scored"

    client_id: str
    loss: float
    lines: tuple[str, ...]
    examples: tuple[str, ...]

    @staticmethod
    def of(
        client_id: str, loss: float, lines: Iterable[Line], examples: Iterable[Line]
    ) -> "Scored":
        """The same from lines that are not JSON yet."""
        return Scored(
            client_id, loss, *(tuple(map(json.dumps, each)) for each in (lines, examples))
        )


class Crew(Protocol):
    """Who shares a job; the groups of clients and what comes of them do not depend on it."""

    def share(
        self,
        job: Job,
        groups: Iterable[Sequence[str]],
        do: Callable[[Sequence[str]], Sequence[T]],
    ) -> Iterator[Sequence[T]]:
        """What comes of each group, in their order; `do` does the job for one, here.

        Nothing is done before it is asked for.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """One process does all, one group after the other."""

    def share(
        self,
        job: Job,  # noqa: ARG002
        groups: Iterable[Sequence[str]],
        do: Callable[[Sequence[str]], Sequence[T]],
    ) -> Iterator[Sequence[T]]:
        """See `Crew`."""
        return map(do, groups)
