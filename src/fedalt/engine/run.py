"""A run from its first round to its tables' numbers: rounds, validation, and test at the end."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

from fedalt.adapters.initializer import Initializer
from fedalt.engine.adaptive_clip import clip_now
from fedalt.engine.client_work import ClientWork
from fedalt.engine.executor import Do, Executor, InProcess, Job, Score, Train
from fedalt.engine.firewall import Firewall, Screening
from fedalt.engine.local_trainer import LocalTrainer
from fedalt.engine.members import Members
from fedalt.engine.privacy import Budget
from fedalt.engine.record_lines import round_line, score_line, train_line
from fedalt.engine.round import Outcome, run_round
from fedalt.engine.schedule import UNTRAINED, Arm, Event, HeldOut, Journal, Line, Progress, Schedule
from fedalt.engine.states import server_of
from fedalt.engine.traffic import Coding, Downlink, Traffic
from fedalt.engine.uploads import Upload


@dataclass(frozen=True)
class Run:
    """All that a run needs; `start` draws what clients begin with, `executor` shares the work.

    `base` serves the base model as it is; None where that has no score. `budget` is that of
    privacy, of the arm that is asked for.
    """

    arms: Sequence[Arm]
    members: Members
    schedule: Schedule
    trainer: LocalTrainer
    init: Initializer
    journal: Journal
    on_event: Callable[[Event], None]
    firewall: Firewall
    traffic: Traffic = field(default_factory=Traffic)
    executor: Executor = field(default_factory=InProcess)
    base: Arm | None = None
    budget: Budget | None = None

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
            self.score_base("test")
            if lines:
                self.journal.keep_examples(lines)
            progress = replace(progress, tested=True)
            self.journal.commit(progress)
        return progress

    def _round(self, progress: Progress, round_: int) -> Progress:
        began = time.monotonic()
        cohort = self.schedule.cohort(self.members.at(round_), round_, self.trainer.seed)
        progress = progress.since(self.members.changed(round_))
        last = round_ + 1 == self.schedule.rounds
        spent = {} if self.budget is None else self.budget.begin(cohort)
        outcomes: dict[str, Outcome] = {}
        for arm in self.arms:
            outcomes[arm.column] = self._train(arm, round_, cohort)
            if last or (round_ + 1) % self.schedule.evaluate_every == 0:
                losses = self.score(arm, round_, "validation", whole=False)
                best = progress.best_with(arm.column, round_, losses)
                progress = replace(progress, best=best)
        line = round_line(round_, len(cohort), began, outcomes["own"])
        self.journal.record({**line, **spent})
        progress = replace(progress, rounds_done=round_ + 1, tested=False)
        self.journal.commit(progress)
        return progress

    def _train(self, arm: Arm, round_: int, cohort: Sequence[str]) -> Outcome:
        """A round of an arm."""
        states = self.journal.states(arm.column, round_)

        def train(downlink: Downlink, cohort: Sequence[str]) -> chain[Upload]:
            job, work = Train(arm.column, round_), self._work(arm, round_, round_, downlink)
            groups = self.trainer.groups(cohort)
            return chain.from_iterable(self.executor.share(job, groups, work.train))

        def reject(client_id: str, reason: str) -> None:
            self.on_event(Event("refuse", round_, arm.column, client_id, 1, 1, reason=reason))

        screening = Screening(self.firewall, self.schedule.robust, self.schedule.trim)
        budget = self._budget(arm)
        release = None if budget is None else budget.release(arm.method, states, round_)
        called = self.schedule.called(self.members.at(round_), round_, cohort)
        outcome = run_round(
            arm.method,
            self.init,
            states,
            cohort,
            train,
            screening,
            release=release,
            coding=self._coding(arm),
            heard=lambda: called,
            leaving=self.members.leaving(round_),
        )
        for client in outcome.clients:
            self.journal.record(train_line(round_, arm.column, client))
            if client.refused is not None:
                reject(client.client_id, client.refused)
        if not outcome.aggregated:
            reject("", "no upload was accepted; the server's state stays as it was")
        return outcome

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
        clients = self.members.at(self.schedule.rounds - 1 if round_ == UNTRAINED else round_)
        places = {client_id: at for at, client_id in enumerate(clients, 1)}
        what: Literal["validate", "test"] = "validate" if split == "validation" else "test"
        job = Score(arm.column, round_, split, whole, show is not None)
        groups = (
            [client_id for client_id, _ in group] for group in self.trainer.scored(clients, split)
        )
        for scored in chain.from_iterable(self.executor.share(job, groups, self.work(job))):
            losses.append(scored.metrics[arm.column]["loss"])
            for column, metrics in scored.metrics.items():
                line = score_line(split, round_, scored.client_id, column, metrics)
                self.journal.record(line)
            if scored.mixer:
                about = {"split": split, "round": round_, "client": scored.client_id}
                facts = json.loads(scored.mixer)
                self.journal.record({"kind": "mixer", **about, "column": arm.column, **facts})
            if show is not None:
                for text in scored.examples:
                    show(json.loads(text))
            at, of = places[scored.client_id], len(places)
            self.on_event(Event(what, round_, arm.column, scored.client_id, at, of))
        return losses

    def score_base(self, split: HeldOut) -> None:
        """Score the base model without any adapter, if it has a score: no round changes that."""
        if self.base is not None:
            self.score(self.base, UNTRAINED, split, whole=True)

    def work(self, job: Job) -> Do[Any]:
        """Does a job for any group of clients, in whichever process."""
        arms = [*self.arms, *([self.base] if self.base else [])]
        (arm,) = (arm for arm in arms if arm.column == job.column)
        match job:
            case Train():
                return self._work(arm, job.round, job.round).train
            case Score():
                return partial(
                    self._work(arm, job.round, job.round + 1).score,
                    split=job.split,
                    whole=job.whole,
                    show=job.show,
                    watch=arm.column == "own",
                )

    def _work(self, arm: Arm, round_: int, at: int, downlink: Downlink | None = None) -> ClientWork:
        """The clients' work in a round, on their states as round `at` finds them."""
        states, coding = self.journal.states(arm.column, at), self._coding(arm)
        if downlink is None:
            leaving = self.members.leaving(round_) if at == round_ else ()
            downlink = coding.downlink(states, server_of(arm.method, self.init, states, leaving))
        budget = self._budget(arm)
        return ClientWork(
            arm,
            self.init,
            self.trainer,
            states,
            round_,
            sent=downlink.message,
            on_event=self.on_event,
            protection=None if budget is None else budget.protection(clip_now(states)),
            coding=coding,
        )

    def _budget(self, arm: Arm) -> Budget | None:
        """The local-only baseline sends nothing, and has nothing to hide."""
        return self.budget if arm.column == "own" else None

    def _coding(self, arm: Arm) -> Coding:
        return Coding(arm.method, self.init, self.traffic, self.members.clients)
