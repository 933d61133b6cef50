"""A run from its first round to its tables' numbers: rounds, validation, and test at the end."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final, Literal

from fedalt.adapters.start import Start
from fedalt.core import tree as trees
from fedalt.data.examples import Example
from fedalt.engine.example_log import mixer_facts, telling
from fedalt.engine.executor import Alone, Crew, Score, Scored, Train
from fedalt.engine.firewall import Firewall
from fedalt.engine.local_trainer import Learner
from fedalt.engine.round import ClientRound, Exchange, Reply, servings
from fedalt.engine.schedule import Arm, Event, HeldOut, Journal, Line, Progress, Schedule
from fedalt.engine.screening import Gate
from fedalt.methods.contract import Serving
from fedalt.training.group import Trained
from fedalt.training.orders import Moments, Order

TRAINED: Final = "trained "
WATCHED: Final = 8  # examples of each client on which a mixer's weights are looked at


@dataclass(frozen=True)
class Run:
    """All that a run needs; `start` draws what clients begin with, `crew` does what is to do."""

    arms: Sequence[Arm]
    clients: Sequence[str]
    schedule: Schedule
    learner: Learner
    start: Start
    journal: Journal
    hear: Callable[[Event], None]
    firewall: Firewall
    crew: Crew = field(default_factory=Alone)

    def to_the_end(self) -> Progress:
        """Go on from where the journal stands until the test data is scored."""
        progress = self.journal.progress()
        for round_ in range(progress.rounds_done, self.schedule.rounds):
            progress = self._round(progress, round_)
        if self.schedule.test and not progress.tested:
            lines: list[Line] = []
            for arm in self.arms:
                at = progress.chosen(arm.column, self.schedule.select)
                show = lines.append if arm.column == "own" else None
                self.score(arm, at, "test", whole=True, show=show)
            if lines:
                self.journal.keep_examples(lines)
            progress = replace(progress, tested=True)
            self.journal.commit(progress)
        return progress

    def _round(self, progress: Progress, round_: int) -> Progress:
        began = time.monotonic()
        cohort = self.schedule.cohort(self.clients, round_, self.learner.seed)
        last = round_ + 1 == self.schedule.rounds
        for arm in self.arms:
            self._train(arm, round_, cohort)
            if last or (round_ + 1) % self.schedule.evaluate_every == 0:
                losses = self.score(arm, round_, "validation", whole=False)
                best = progress.best_with(arm.column, round_, losses)
                progress = replace(progress, best=best)
        self.journal.record(round_line(round_, len(cohort), began))
        progress = replace(progress, rounds_done=round_ + 1)
        self.journal.commit(progress)
        return progress

    def _train(self, arm: Arm, round_: int, cohort: Sequence[str]) -> None:
        exchange = self._exchange(arm, round_)

        def report(cost: ClientRound) -> None:
            self.journal.record(
                {
                    "kind": "train",
                    "round": round_,
                    "client": cost.client_id,
                    "column": arm.column,
                    "metrics": cost.metrics,
                    "upload_bytes": cost.upload_bytes,
                    "download_bytes": cost.download_bytes,
                    "seconds": cost.seconds,
                    **({} if cost.refused is None else {"refused": cost.refused}),
                }
            )
            if cost.refused is not None:
                refuse(cost.client_id, cost.refused)

        def refuse(client_id: str, reason: str) -> None:
            self.hear(Event("refuse", round_, arm.column, client_id, 1, 1, reason=reason))

        gate = Gate(self.firewall, self.schedule.robust, self.schedule.trim)
        replies = self.crew.share(
            Train(arm.column, round_),
            self.learner.groups(cohort),
            self._trains(exchange, arm, round_),
        )
        if not exchange.take_in(chain.from_iterable(replies), report, gate):
            refuse("", "every upload was refused: the server's state stays as it was")

    def score(
        self,
        arm: Arm,
        round_: int,
        split: HeldOut,
        *,
        whole: bool,
        show: Callable[[Line], None] | None = None,
    ) -> list[float]:
        """Score what every client serves after a round; the losses of the arm's own column.

        One for each client with data. `whole` also scores the shared part and generated texts,
        which is what takes long. `show` gets lines of each client's best and worst examples.
        """
        losses: list[float] = []
        places = {client_id: at for at, client_id in enumerate(self.clients, 1)}
        what: Literal["validate", "test"] = "validate" if split == "validation" else "test"
        job = Score(arm.column, round_, split, whole, show is not None)
        groups = (
            [client_id for client_id, _ in group]
            for group in self.learner.scored(self.clients, split)
        )
        for scored in chain.from_iterable(self.crew.share(job, groups, self._scores(arm, job))):
            losses.append(scored.loss)
            for line in scored.lines:
                self.journal.record(json.loads(line))
            if show is not None:
                for line in scored.examples:
                    show(json.loads(line))
            at, of = places[scored.client_id], len(places)
            self.hear(Event(what, round_, arm.column, scored.client_id, at, of))
        return losses

    def work(self, job: Train | Score) -> Callable[[Sequence[str]], Sequence[Reply | Scored]]:
        """Does a job for any group of clients, in whichever process."""
        (arm,) = (each for each in self.arms if each.column == job.column)
        match job:
            case Train():
                return self._trains(self._exchange(arm, job.round), arm, job.round)
            case Score():
                return self._scores(arm, job)

    def _exchange(self, arm: Arm, round_: int) -> Exchange:
        return Exchange.of(arm.method, self.start, self.journal.states(arm.column, round_))

    def _trains(
        self, exchange: Exchange, arm: Arm, round_: int
    ) -> Callable[[Sequence[str]], list[Reply]]:
        """Trains the clients of a group."""

        def on_step(client_id: str, done: int, of: int, loss: float) -> None:
            self.hear(Event("train", round_, arm.column, client_id, done, of, loss))

        together = self.learner.carry_out(round_, exchange.states, on_step)

        def train(group: Sequence[str]) -> list[Reply]:
            trained: dict[str, list[Trained]] = {}

            def carry_out(orders: Sequence[tuple[str, int, Order]]) -> list[object]:
                found = together(orders)
                for (client_id, _, _), (_, cost) in zip(orders, found, strict=True):
                    if cost is not None:
                        numbers = replace(cost, tree={}, moments=Moments())  # of a whole group
                        trained.setdefault(client_id, []).append(numbers)
                return [answer for answer, _ in found]

            return [
                replace(reply, metrics=training_metrics(trained.get(reply.client_id, [])))
                for reply in exchange.train(group, carry_out)
            ]

        return train

    def _scores(self, arm: Arm, job: Score) -> Callable[[Sequence[str]], list[Scored]]:
        """Scores the clients of a group."""
        states = self.journal.states(arm.column, job.round + 1)
        carry_out = self.learner.deploying(job.round)
        watch = WATCHED if arm.column == "own" else 0

        def score(clients: Sequence[str]) -> list[Scored]:
            group = [(each, self.learner.task.examples(each, job.split)) for each in clients]
            served = [
                servings(arm.method, self.start, states, client_id, carry_out)
                for client_id in clients
            ]
            asked = [(own, each) for (own, _), (_, each) in zip(served, group, strict=True)]
            scores = self.learner.score(asked, generate=job.whole, watch=watch)
            shared = self._shared(served, group) if job.whole else {}
            found = []
            for (client_id, examples), (own, _), each in zip(group, served, scores, strict=True):
                metrics: dict[str, Mapping[str, float]] = {arm.column: each.metrics}
                if client_id in shared:
                    metrics["shared"] = shared[client_id] or each.metrics
                about = {"split": job.split, "round": job.round, "client": client_id}
                lines: list[Line] = [
                    {"kind": "score", **about, "column": column, "metrics": metrics[column]}
                    for column in metrics
                ]
                if each.weighing is not None:
                    line = {"kind": "mixer", **about, "column": arm.column}
                    lines.append({**line, **mixer_facts(each.weighing)})
                told: list[Line] = []
                if job.show:
                    line = {"client": client_id, "column": arm.column, "round": job.round}
                    examples_told = telling(self.learner.base, own, examples, each)
                    told = [{**line, **example} for example in examples_told]
                found.append(Scored.of(client_id, each.metrics["loss"], lines, told))
            return found

        return score

    def _shared(
        self,
        served: Sequence[tuple[Serving, Serving | None]],
        group: Sequence[tuple[str, Sequence[Example]]],
    ) -> dict[str, Mapping[str, float] | None]:
        """Metrics of the shared part, where there is one; None where it is all that is served."""
        found: dict[str, Mapping[str, float] | None] = {}
        asked = {}
        for (client_id, examples), (own, shared) in zip(group, served, strict=True):
            if shared is not None:
                found[client_id] = None
                if shared.plan != own.plan or not trees.equal(shared.tree, own.tree):
                    asked[client_id] = shared, examples
        scores = self.learner.score(list(asked.values()))
        return found | {
            client_id: each.metrics for client_id, each in zip(asked, scores, strict=True)
        }


def training_metrics(fits: Sequence[Trained]) -> dict[str, float]:
    """Mean loss over all steps of a client's fits, their number, and their tokens.

    Under TRAINED with slot and factor: how many numbers they trained.
    """
    steps = sum(each.steps for each in fits)
    loss = sum(each.loss * each.steps for each in fits) / max(steps, 1)
    trained = {
        f"{TRAINED}{slot} {factor}": count
        for each in fits
        for (slot, factor), count in sorted(each.trained.items())
    }
    return {"loss": loss, "steps": steps, "tokens": sum(each.tokens for each in fits), **trained}


def round_line(round_: int, cohort: int, began: float) -> Line:
    """What is recorded of a round: its seconds since `began`, the most memory held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "kind": "round",
        "round": round_,
        "cohort": cohort,
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024,
    }
