"""A run from its first round to its tables' numbers: rounds, validation, and test at the end."""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Literal, Protocol

import torch

from fedalt import tree as trees
from fedalt.adapters.start import Start
from fedalt.engine.in_process import ClientRound, States, run_round, servings
from fedalt.engine.learner import Learner
from fedalt.methods.contract import AnyMethod
from fedalt.seeds import generator
from fedalt.training.group import Trained
from fedalt.training.orders import Order

Column = Literal["own", "shared", "local"]
HeldOut = Literal["validation", "test"]
Line = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run lasts and who takes part.

    `participation` in (0, 1]: the share of the clients in a round's cohort, drawn anew each round.
    Validation data is scored every `evaluate_every` rounds and after the last one; with
    `select="best"` the round with the lowest mean validation loss is the one that is tested.
    Without `test` the test data are never read.
    """

    rounds: int = 20
    participation: float = 1.0
    evaluate_every: int = 1
    select: Literal["best", "last"] = "best"
    test: bool = True

    def __post_init__(self) -> None:
        for name in ("rounds", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but it is at least 1")
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation={self.participation}, but it is above 0 and at most 1")

    def cohort(self, clients: Sequence[str], round_: int, seed: int) -> list[str]:
        """The clients of a round, sorted; the same for every method."""
        size = max(1, round(self.participation * len(clients)))
        stream = generator(seed, "cohort", round_)
        chosen = torch.randperm(len(clients), generator=stream)[:size].tolist()
        return sorted(clients[index] for index in chosen)


@dataclass(frozen=True)
class Arm:
    """One method of a run: the one asked for ("own"), or the yardstick beside it ("local")."""

    column: Column
    method: AnyMethod


@dataclass(frozen=True)
class Progress:
    """How far a run is: what a crash may not lose.

    `best` holds for each arm's column the best round so far and its mean validation loss.
    """

    rounds_done: int = 0
    best: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    tested: bool = False

    def chosen(self, column: str, select: str) -> int:
        """The round that an arm is tested at."""
        if select == "best" and column in self.best:
            return self.best[column][0]
        return self.rounds_done - 1


@dataclass(frozen=True)
class Event:
    """A sign of life for whoever watches: `done` of `of` steps, clients or scorings."""

    what: Literal["train", "validate", "test"]
    round: int
    column: str
    client_id: str
    done: int
    of: int
    loss: float | None = None


class Journal(Protocol):
    """What a run writes down, and where it finds its states again."""

    def progress(self) -> Progress:
        """How far the run is."""
        ...

    def states(self, column: str, round_: int) -> States:
        """An arm's states: read as after round `round_` - 1, written for `round_`."""
        ...

    def record(self, line: Line) -> None:
        """Add one line to the run's record."""
        ...

    def commit(self, progress: Progress) -> None:
        """Make everything since the last commit count, at once."""
        ...


@dataclass(frozen=True)
class Run:
    """All that a run needs; `start` draws what clients begin with."""

    arms: Sequence[Arm]
    clients: Sequence[str]
    schedule: Schedule
    learner: Learner
    start: Start
    journal: Journal
    hear: Callable[[Event], None]

    def to_the_end(self) -> Progress:
        """Go on from where the journal stands until the test data is scored."""
        progress = self.journal.progress()
        for round_ in range(progress.rounds_done, self.schedule.rounds):
            progress = self._round(progress, round_)
        if self.schedule.test and not progress.tested:
            for arm in self.arms:
                at = progress.chosen(arm.column, self.schedule.select)
                self.score(arm, at, "test", whole=True)
            progress = replace(progress, tested=True)
            self.journal.commit(progress)
        return progress

    def _round(self, progress: Progress, round_: int) -> Progress:
        began = time.monotonic()
        cohort = self.schedule.cohort(self.clients, round_, self.learner.seed)
        best = dict(progress.best)
        last = round_ + 1 == self.schedule.rounds
        for arm in self.arms:
            self._train(arm, round_, cohort)
            if last or (round_ + 1) % self.schedule.evaluate_every == 0:
                loss = self.score(arm, round_, "validation", whole=False)
                if loss is not None and loss < best.get(arm.column, (0, float("inf")))[1]:
                    best[arm.column] = (round_, loss)
        self.journal.record(
            {
                "kind": "round",
                "round": round_,
                "cohort": len(cohort),
                "seconds": time.monotonic() - began,
                "peak_memory_bytes": peak_memory(),
            }
        )
        progress = Progress(round_ + 1, best)
        self.journal.commit(progress)
        return progress

    def _train(self, arm: Arm, round_: int, cohort: Sequence[str]) -> None:
        states = self.journal.states(arm.column, round_)
        trained: dict[str, list[Trained]] = {}

        def on_step(client_id: str, done: int, of: int, loss: float) -> None:
            self.hear(Event("train", round_, arm.column, client_id, done, of, loss))

        together = self.learner.carry_out(round_, states, on_step)

        def carry_out(orders: Sequence[tuple[str, int, Order]]) -> list[object]:
            found = together(orders)
            for (client_id, _, _), (_, cost) in zip(orders, found, strict=True):
                if cost is not None:
                    trained.setdefault(client_id, []).append(cost)
            return [answer for answer, _ in found]

        def report(cost: ClientRound) -> None:
            fits = trained.pop(cost.client_id, [])
            steps = sum(each.steps for each in fits)
            loss = sum(each.loss * each.steps for each in fits) / max(steps, 1)
            tokens = sum(each.tokens for each in fits)
            self.journal.record(
                {
                    "kind": "train",
                    "round": round_,
                    "client": cost.client_id,
                    "column": arm.column,
                    "metrics": {"loss": loss, "steps": steps, "tokens": tokens},
                    "upload_bytes": cost.upload_bytes,
                    "download_bytes": cost.download_bytes,
                    "seconds": cost.seconds,
                }
            )

        groups = self.learner.groups(cohort)
        run_round(arm.method, self.start, states, groups, carry_out, report)

    def score(self, arm: Arm, round_: int, split: HeldOut, *, whole: bool) -> float | None:
        """Score what every client serves after a round; the mean loss of the arm's own column.

        None where no client has data. `whole` also scores the shared part and generated texts,
        which is what takes long.
        """
        states = self.journal.states(arm.column, round_ + 1)
        losses = []
        what: Literal["validate", "test"] = "validate" if split == "validation" else "test"
        for index, client_id in enumerate(self.clients):
            if not self.learner.task.examples(client_id, split):
                continue

            carry_out = self.learner.deploying(round_)
            own, shared = servings(arm.method, self.start, states, client_id, carry_out)
            score = partial(self.learner.score, client_id, split, generate=whole)
            metrics = {arm.column: score(own).metrics}
            if shared is not None and whole:
                same = shared.plan == own.plan and trees.equal(shared.tree, own.tree)
                metrics["shared"] = metrics[arm.column] if same else score(shared).metrics
            losses.append(metrics[arm.column]["loss"])
            for column in metrics:
                self.journal.record(
                    {
                        "kind": "score",
                        "split": split,
                        "round": round_,
                        "client": client_id,
                        "column": column,
                        "metrics": metrics[column],
                    }
                )
            self.hear(Event(what, round_, arm.column, client_id, index + 1, len(self.clients)))
        return fmean(losses) if losses else None


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
