"""The schedule of a run: how long it lasts, who takes part, how far it is, its events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal, Protocol

from fedalt.core.settings import Schedule as Schedule
from fedalt.engine.robust import central_loss
from fedalt.engine.states import States
from fedalt.methods.contract import AnyMethod

Column = Literal["own", "shared", "local"]
ArmColumn = Literal["own", "local", "base"]
HeldOut = Literal["validation", "test"]
Line = Mapping[str, object]

UNTRAINED: Final = -1  # the round of a score before any training


def moment(when: int | str) -> str:
    """When something trains, as people count: in a round, from 1, or once a round is over.

    `when` is the round from 0, or a word and the round that it comes after, as in "deploy 3".
    """
    if isinstance(when, int):
        return f"round {when + 1}"
    what, _, after = when.partition(" ")
    said = "before serving" if what == "deploy" else what
    return f"{said} after round {int(after) + 1}"


@dataclass(frozen=True)
class Arm:
    """One method of a run: the one asked for ("own"), or the local-only baseline ("local").

    "base" is never trained: its clients serve the base model as it is.
    """

    column: ArmColumn
    method: AnyMethod


@dataclass(frozen=True)
class Progress:
    """How far a run is: what a crash may not lose.

    `best` holds for each arm's column the best round so far and its central validation loss.
    """

    rounds_done: int = 0
    best: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    tested: bool = False

    def best_with(
        self, column: str, round_: int, losses: Sequence[float]
    ) -> dict[str, tuple[int, float]]:
        """`best` once a round's validation losses, one for each client, are known too."""
        best = dict(self.best)
        if losses and (loss := central_loss(losses)) < best.get(column, (0, math.inf))[1]:
            best[column] = (round_, loss)
        return best

    def since(self, round_: int) -> "Progress":
        """The same without best rounds before this one, whose losses were of other clients."""
        return replace(self, best={c: best for c, best in self.best.items() if best[0] >= round_})

    def sound(self) -> "Progress":
        """The same without best rounds that are none: of a round not done, or below any loss."""
        best = {
            column: (round_, loss)
            for column, (round_, loss) in self.best.items()
            if 0 <= round_ < self.rounds_done and loss >= 0
        }
        return replace(self, best=best)

    def chosen(self, column: str, select: str) -> int:
        """The round that an arm is tested at."""
        if select == "best" and column in self.best:
            return self.best[column][0]
        return self.rounds_done - 1


@dataclass(frozen=True)
class Event:
    """A sign of life for whoever watches: `done` of `of` steps, clients or scorings.

    After "refuse" the `reason` says why an upload was rejected; without a client, why the server
    keeps its state.
    """

    TAG: ClassVar = "event"

    what: Literal["train", "validate", "test", "refuse"]
    round: int
    column: str
    client_id: str
    done: int
    of: int
    loss: float | None = None
    reason: str = ""


class Journal(Protocol):
    """What a run writes down, and where it finds its states again."""

    def progress(self) -> Progress:
        """How far the run is."""

    def states(self, column: str, round_: int) -> States:
        """An arm's states: read as after round `round_` - 1, written for `round_`."""

    def record(self, line: Line) -> None:
        """Add one line to the run's record."""

    def keep_examples(self, lines: Sequence[Line]) -> None:
        """Keep a few tested examples, in place of those that were kept before."""

    def commit(self, progress: Progress) -> None:
        """Make everything since the last commit count, at once."""
