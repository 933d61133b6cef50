"""The server of a federation: calls clients, checks what comes back, aggregates, never forgets.

Its folder is a run's folder without clients' states, and beside that

    incoming/0007/ID.bin   answers of the round in progress, as they came
    refused.jsonl          uploads that were rejected, and why
    status.json            who is there, who was heard when

An answer is on disk before it counts, a round counts once progress.json is replaced: the process
may be killed at any time and goes on where it was.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fedalt.core.codec import encode
from fedalt.engine.record_lines import (
    is_validated,
    last_accepted,
    round_line,
    score_line,
    train_line,
)
from fedalt.engine.round import ClientRound, run_round
from fedalt.engine.schedule import Arm, Progress
from fedalt.engine.screening import Screening
from fedalt.engine.states import server_of
from fedalt.engine.uploads import Upload
from fedalt.federation.agreement import Agreement, facts_of
from fedalt.federation.messages import NEVER, Call, Split
from fedalt.federation.roster import members_of, update_members
from fedalt.federation.round_collector import Called, RoundCollector, Say
from fedalt.federation.rules import Rules
from fedalt.federation.transport import Transport
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import RunFolder, StoreError, create, open_run, require_settings
from fedalt.runs.settings import to_toml
from fedalt.runs.setup import arms_of

_FAREWELL: Final = 30.0  # seconds to hear from everyone that they know it has ended


@dataclass(frozen=True)
class Server:
    """A server with its folder and its connection. Use it within `locked(folder.path)`.

    `roster` is the file that names who was added and removed, if there can be one.
    """

    agreement: Agreement
    arms: tuple[Arm, ...]
    folder: RunFolder
    transport: Transport
    rules: Rules
    screening: Screening
    say: Say
    roster: Path | None = None

    def to_the_end(self) -> None:
        """Go on from where the folder stands until the test data are scored and all know it."""
        schedule = self.agreement.settings.rounds
        progress = self.folder.progress().sound()
        self.folder.require_whole()
        self._sweep(progress)
        called: Called = {}
        for round_ in range(progress.rounds_done, schedule.rounds):
            progress = self._round(progress, round_, called)
        if not is_validated(self.folder.lines(), schedule.rounds - 1):
            last = dict.fromkeys(self._columns, schedule.rounds - 1)
            collector = self._scored(progress, schedule.rounds, last, called)
            progress = self._with_best(progress, collector, last)
            self.folder.commit(progress)
        if schedule.test and not progress.tested:
            chosen = {column: progress.chosen(column, schedule.select) for column in self._columns}
            self._scored(progress, progress.rounds_done + 1, chosen, called, "test")
            progress = replace(progress, tested=True)
            self.folder.commit(progress)
        self._farewell(progress, called)

    def _round(self, progress: Progress, round_: int, called: Called) -> Progress:
        """Train a cohort and, in the same calls, score the round before on validation data."""
        began = time.monotonic()
        schedule, method = self.agreement.settings.rounds, self.arms[0].method
        members = update_members(self.folder, self.roster, self.agreement, round_, self.say)
        cohort = schedule.cohort(self._clients(), round_, self.agreement.settings.seed)
        scored = round_ > 0 and round_ % schedule.evaluate_every == 0
        score = dict.fromkeys(self._columns, round_ - 1) if scored else {}
        self.say(f"round {round_}: {len(cohort)} of {len(self._clients())} clients train")
        collector = self._collector(round_, called)

        def train(server: Any, cohort: Sequence[str]) -> Iterator[Upload]:
            call = self._calling(progress, round_, score, server)
            clients = self._clients() if scored else cohort
            collector.gather({who: call(who, train=who in cohort) for who in clients}, cohort)
            return collector.uploads()

        states = self._states(round_)
        place, leaving = (method, self.agreement.start, states), members.leaving(round_)
        outcome = run_round(*place, cohort, train, self.screening, leaving=leaving)
        if not outcome.aggregated:
            self.say(f"round {round_}: no upload was accepted; the server's state stays as it was")
        rejected = self._record(collector, outcome.clients)
        self.folder.record(round_line(round_, len(cohort), began))
        progress = self._with_best(progress, collector, score, rejected)
        progress = replace(progress, rounds_done=round_ + 1)
        self.folder.commit(progress)
        self._sweep(progress)
        return progress

    def _scored(
        self,
        progress: Progress,
        round_: int,
        score: Mapping[str, int],
        called: Called,
        split: Split = "validation",
    ) -> RoundCollector:
        """All clients' scores of a column's round each, recorded but not committed."""
        at = score.get("own", round_ - 1) if split == "test" else progress.rounds_done - 1
        call = self._calling(progress, round_, score, self._server_after(at), split)
        collector = self._collector(round_, called)
        collector.gather({client_id: call(client_id) for client_id in self._clients()})
        self._record(collector, ())
        return collector

    def _farewell(self, progress: Progress, called: Called) -> None:
        """Tell everyone who is there that nothing comes any more; nobody is waited for long."""
        after = self._server_after(progress.rounds_done - 1)
        call = self._calling(progress, progress.rounds_done + 2, {}, after)
        self.say("the federation has ended")
        online = self.transport.online()
        waiting = {who: 1 + len(called.get(who, ())) for who in self._clients() if who in online}
        self.transport.send((who, encode(call(who, last=True))) for who in waiting)
        end = time.monotonic() + _FAREWELL
        while any(waiting.values()) and time.monotonic() < end:
            for who, _ in self.transport.receive():  # who goes away without an answer has heard it
                waiting[who] = waiting.get(who, 1) - 1
        if deaf := sorted(who for who in self._clients() if waiting.get(who, 1) > 0):
            self.say(
                f"not told that it has ended: {', '.join(deaf)}; the server, started again, tells "
                "them"
            )
        self._sweep(replace(progress, rounds_done=progress.rounds_done + 3))

    def _calling(
        self,
        progress: Progress,
        round_: int,
        score: Mapping[str, int],
        server: Any,
        split: Split = "validation",
    ) -> Callable[..., Call]:
        """Makes calls of one kind, with what a server in this state sends."""
        accepted = last_accepted(self.folder.lines())
        keep = {column: best[0] for column, best in progress.best.items()}

        def call(client_id: str, *, train: bool = False, last: bool = False) -> Call:
            return Call(
                federation=self.agreement.name,
                terms=self.agreement.digest,
                client=client_id,
                round=round_,
                accepted=accepted.get(client_id, NEVER),
                train=train,
                message=self.arms[0].method.broadcast(server, client_id),
                score=dict(score),
                split=split,
                keep=keep,
                last=last,
            )

        return call

    def _record(self, collector: RoundCollector, clients: Sequence[ClientRound]) -> set[str]:
        """Record scores and training of a round; who was rejected, of whom no score is recorded."""
        rejected = {client.client_id for client in clients if client.refused is not None}
        for client_id in sorted(collector.answers.keys() - rejected):
            for score in collector.answers[client_id].scores:
                about = score.split, score.round, client_id, score.column
                self.folder.record(score_line(*about, score.metrics))
        for client in clients:
            if client.refused is not None:
                self.say(f"round {collector.round}: {client.client_id}: refused: {client.refused}")
            answer = collector.answers[client.client_id]
            for cost in answer.costs:
                trained = replace(client, seconds=cost.seconds, metrics=cost.metrics)
                if cost.column != "own":  # the baseline sends and receives nothing
                    trained = replace(trained, upload_bytes=0, download_bytes=0)
                line = train_line(collector.round, cost.column, trained, trained=answer.round)
                self.folder.record(line)
        return rejected

    def _with_best(
        self,
        progress: Progress,
        collector: RoundCollector,
        asked: Mapping[str, int],
        rejected: Collection[str] = (),
    ) -> Progress:
        """The best rounds once the scores that a round has asked for are known.

        Late and rejected answers are none; and unless more than half of the clients have answered,
        the few do not choose for all. Rounds of other clients than now cannot be compared.
        """
        answers = [
            answer
            for client_id, answer in collector.answers.items()
            if answer.call and answer.round == collector.round and client_id not in rejected
        ]
        changed = members_of(self.folder).changed(progress.rounds_done)
        progress = progress.since(changed)
        if 2 * len(answers) <= len(self._clients()):
            return progress
        for column, round_ in asked.items():
            if round_ < changed:
                continue
            losses = [
                score.metrics["loss"]
                for answer in answers
                for score in answer.scores
                if (score.split, score.column, score.round) == ("validation", column, round_)
            ]
            progress = replace(progress, best=progress.best_with(column, round_, losses))
        return progress

    def _sweep(self, progress: Progress) -> None:
        """Drop answers of rounds that are over."""
        for old in (self.folder.path / "incoming").glob("[0-9]*"):
            if old.name.isdecimal() and int(old.name) < progress.rounds_done and old.is_dir():
                shutil.rmtree(old)

    def _collector(self, round_: int, called: Called) -> RoundCollector:
        return RoundCollector(
            self.agreement,
            self._columns,
            self.folder.path,
            self.transport,
            self.rules,
            self.screening,
            self.say,
            round_,
            called,
        )

    def _server_after(self, round_: int) -> Any:
        """The method's server after a round."""
        return server_of(self.arms[0].method, self.agreement.start, self._states(round_ + 1))

    def _states(self, round_: int) -> FileStates:
        return self.folder.states("own", round_)

    def _clients(self) -> list[str]:
        left = self.folder.left()
        return sorted(self.folder.facts()["clients"].keys() - left)

    @property
    def _columns(self) -> list[str]:
        return [arm.column for arm in self.arms]


def open_server(
    agreement: Agreement,
    folder: Path,
    transport: Transport,
    rules: Rules,
    screening: Screening,
    say: Say,
    roster: Path | None = None,
) -> Server:
    """The server in its folder, which is made if it is not there. Raises StoreError."""
    arms, settings = arms_of(agreement.settings), to_toml(agreement.settings)
    if not (folder / "run.json").exists():
        create(folder, settings, facts_of(agreement, arms))
    run = open_run(folder)
    server = Server(agreement, arms, run, transport, rules, screening, say, roster)
    if (terms := server.folder.facts().get("terms")) != agreement.digest:
        raise StoreError(
            f"{folder} belongs to other terms than terms.toml (and its template.txt, if it has "
            f"one): its run.json says {terms!r}, but they are {agreement.digest!r}"
        )
    require_settings(folder, settings)
    return server
