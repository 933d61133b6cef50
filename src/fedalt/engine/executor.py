"""Who does the work of a run: groups of clients to train and to score, shared out in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fedalt.engine.schedule import ArmColumn, HeldOut

T = TypeVar("T")
Group = Sequence[str]  # of clients that go through the model together
Do = Callable[[Group], Sequence[T]]  # does a job for one group


@dataclass(frozen=True)
class Train:
    """Train clients in a round, by the arm of a column."""

    column: ArmColumn
    round: int


@dataclass(frozen=True)
class Score:
    """Score what clients serve after a round; `whole` and `show` as in `ClientWork.score`."""

    column: ArmColumn
    round: int
    split: HeldOut
    whole: bool
    show: bool


Job = Train | Score


class Executor(Protocol):
    """Which processes do a job; the groups of clients and the results do not depend on it."""

    def share(self, job: Job, groups: Iterable[Group], do: Do[T]) -> Iterator[Sequence[T]]:
        """The results of each group, in their order; `do` does the job for one, here.

        A group's turn comes when its results are asked for.
        """


@dataclass(frozen=True)
class InProcess:
    """One process does all, one group after the other."""

    def share(
        self,
        job: Job,  # noqa: ARG002
        groups: Iterable[Group],
        do: Do[T],
    ) -> Iterator[Sequence[T]]:
        """See `Executor`."""
        return map(do, groups)
