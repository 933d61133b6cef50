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
from typing import Final

from fedalt.core.codec import encode
from fedalt.engine.firewall import Screening
from fedalt.engine.record_lines import is_validated, last_accepted, round_line
from fedalt.engine.round import ClientRound, run_round
from fedalt.engine.schedule import HeldOut, Progress
from fedalt.engine.traffic import Coding, Downlink
from fedalt.engine.uploads import Upload
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import NEVER, Call
from fedalt.federation.owner_messages import Say
from fedalt.federation.privacy import begin_private, told_by
from fedalt.federation.roster import members_of, members_there, wait_for_anyone
from fedalt.federation.round_collector import Called, RoundCollector
from fedalt.federation.round_record import record
from fedalt.federation.rules import Rules
from fedalt.federation.secure_calls import SumCalls
from fedalt.federation.secure_keys import Signatures, fewest
from fedalt.federation.secure_server import SecureRound
from fedalt.federation.transport import Transport
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import RunFolder

_FAREWELL: Final = 30.0  # seconds to hear from everyone that they know it has ended


@dataclass(frozen=True)
class Server:
    """A server with its folder and its connection. Use it within `locked(folder.path)`.

    `roster` is the file that names who was added and removed, if there can be one; `signatures` are
    the clients', where uploads are summed securely.
    """

    agreement: Agreement
    folder: RunFolder
    transport: Transport
    rules: Rules
    screening: Screening
    say: Say
    roster: Path | None = None
    signatures: Signatures | None = None

    def to_the_end(self) -> None:
        """Go on from where the folder stands until the test data are scored and all know it."""
        schedule, columns = self.agreement.settings.rounds, self.agreement.columns
        progress = self.folder.progress().sound()
        self.folder.require_whole()
        self._sweep(progress)
        called: Called = {}
        for round_ in range(progress.rounds_done, schedule.rounds):
            progress = self._round(progress, round_, called)
        if not is_validated(self.folder.lines(), schedule.rounds - 1):
            last = dict.fromkeys(columns, schedule.rounds - 1)
            collector = self._scored(progress, schedule.rounds, last, called)
            progress = self._with_best(progress, collector, last)
            self.folder.commit(progress)
        if schedule.test and not progress.tested:
            chosen = {column: progress.chosen(column, schedule.select) for column in columns}
            self._scored(progress, progress.rounds_done + 1, chosen, called, "test")
            progress = replace(progress, tested=True)
            self.folder.commit(progress)
        self._farewell(progress, called)

    def _round(self, progress: Progress, round_: int, called: Called) -> Progress:
        """Train a cohort and, in the same calls, score the round before on validation data."""
        began = time.monotonic()
        settings = self.agreement.settings
        schedule = settings.rounds
        members = members_there(self.folder, self.roster, self.agreement, round_, self.say)
        drawn = schedule.cohort(self._clients(), round_, settings.seed)
        cohort, spent, release = begin_private(self.folder, self.agreement, round_, drawn, self.say)
        clients = schedule.called(self._clients(), round_, cohort)
        scored = round_ > 0 and round_ % schedule.evaluate_every == 0
        score = dict.fromkeys(self.agreement.columns, round_ - 1) if scored else {}
        self.say(f"round {round_ + 1}: {len(cohort)} of {len(self._clients())} clients train")
        collector = self._collector(round_, called)
        clip = None if release is None else release.clip
        secure, states = self._secure(collector, cohort), self._states(round_)

        def train(downlink: Downlink, cohort: Sequence[str]) -> Iterator[Upload]:
            call = self._calling(progress, round_, score, downlink, clip=clip)
            calls = {who: call(who, train=who in cohort) for who in clients}
            if secure is None:
                collector.gather(calls, downlink.sent, cohort)
                return collector.uploads()
            if secure.begun:
                collector.resume(calls, downlink.sent)
            else:
                collector.gather(calls, downlink.sent, cohort)
            return secure.uploads(collector.answers, states, downlink.message)

        outcome = run_round(
            settings.method,
            self.agreement.init,
            states,
            cohort,
            train,
            self.screening,
            release=release,
            coding=self._coding,
            heard=collector.heard,
            leaving=members.leaving(round_),
        )
        if not outcome.aggregated:
            self.say(
                f"round {round_ + 1}: no upload was accepted; the server's state stays as it was"
            )
        trained: Sequence[ClientRound] = outcome.clients
        if secure is not None:
            trained = secure.settle(collector.answers, states, outcome, collector.downloads)
        rejected = record(self.folder, self.say, collector, trained)
        spent |= told_by(self.agreement, collector.answers.values(), self.folder.lines())
        line = round_line(round_, len(cohort), began, outcome)
        self.folder.record({**line, **spent})
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
        split: HeldOut = "validation",
    ) -> RoundCollector:
        """All clients' scores of a column's round each, recorded but not committed."""
        wait_for_anyone(self.folder, self.say)
        at = score.get("own", round_ - 1) if split == "test" else progress.rounds_done - 1
        downlink = self._downlink_after(at)
        call = self._calling(progress, round_, score, downlink, split)
        collector = self._collector(round_, called)
        calls = {client_id: call(client_id) for client_id in self._clients()}
        collector.gather(calls, downlink.sent)
        record(self.folder, self.say, collector, ())
        return collector

    def _farewell(self, progress: Progress, called: Called) -> None:
        """Tell everyone who is there that nothing comes any more; nobody is waited for long."""
        after = self._downlink_after(progress.rounds_done - 1)
        call = self._calling(progress, progress.rounds_done + 2, {}, after)
        self.say("the federation has ended")
        online = self.transport.online()
        waiting = {who: 1 + len(called.get(who, ())) for who in self._clients() if who in online}
        self.transport.send((who, encode(call(who, last=True))) for who in waiting)
        end = time.monotonic() + _FAREWELL
        while any(waiting.values()) and time.monotonic() < end:
            for who, _ in self.transport.receive():  # who goes away without an answer has heard it
                if who in waiting:  # not who was away, and whose older call is lost now
                    waiting[who] -= 1
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
        downlink: Downlink,
        split: HeldOut = "validation",
        clip: float | None = None,
    ) -> Callable[..., Call]:
        """Makes calls of one kind, with what the server sends."""
        accepted = last_accepted(self.folder.lines())
        # Which round is the best follows from losses without noise.
        private = self.agreement.settings.privacy.unit == "client"
        keep = {} if private else {column: best[0] for column, best in progress.best.items()}

        def call(client_id: str, *, train: bool = False, last: bool = False) -> Call:
            return Call(
                federation=self.agreement.name,
                terms=self.agreement.digest,
                client=client_id,
                round=round_,
                accepted=accepted.get(client_id, NEVER),
                train=train,
                message=downlink.message(client_id),
                score=dict(score),
                split=split,
                keep=keep,
                last=last,
                expected=self._coding.expected(downlink.digests, client_id) if train else "",
                clip=clip if train and clip is not None else 0.0,
            )

        return call

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
        rules = self.rules
        if self.agreement.settings.privacy.secure_sum:
            rules = replace(rules, minimum=max(rules.minimum, fewest(self.agreement)))
        return RoundCollector(
            self.agreement,
            self._coding,
            self._states(round_),
            self.folder.path,
            self.transport,
            rules,
            self.screening,
            self.say,
            round_,
            called,
            self.signatures,
        )

    def _secure(self, collector: RoundCollector, cohort: Sequence[str]) -> SecureRound | None:
        """The round's secure sum, where there are uploads and they are to be summed so."""
        if not (cohort and self.agreement.settings.privacy.secure_sum):
            return None
        return SecureRound(self.agreement, SumCalls(collector))

    def _downlink_after(self, round_: int) -> Downlink:
        """What the server sends after a round."""
        return self._coding.downlink(self._states(round_ + 1))

    @property
    def _coding(self) -> Coding:
        init, settings = self.agreement.init, self.agreement.settings
        # Who is shut out may come back, and then goes on from what the others have got meanwhile.
        return Coding(settings.method, init, settings.traffic, self._clients(shut_out=True))

    def _states(self, round_: int) -> FileStates:
        return self.folder.states("own", round_)

    def _clients(self, *, shut_out: bool = False) -> list[str]:
        facts = self.folder.facts()
        left = {*facts.get("left", ())} - {*(facts.get("revoked", ()) if shut_out else ())}
        return sorted(facts["clients"].keys() - left)
