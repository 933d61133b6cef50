"""One client of a federation: what it makes of the server's calls, and what it keeps on its disk.

    run.json                     federation, client and terms that the folder belongs to
    clients/ID/0007.safetensors  the client's state after round 7, never sent
    local/...                    the same for the local-only baseline
    answer.bin                   the last answer, sent again if it is asked for again
    accepted.json                the last round of which the server said that it counts, and the
                                 digests of all states, of that one and of what was trained since
    set-aside/                   states that a server has forgotten; see accepted.py
    server/, served.json         what the server sent, for the owner to use the model; see kept.py

A client's round counts once the server says that its upload was accepted. If it was rejected, the
client rolls back to its previous state, so that both always agree on what was uploaded.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedalt.core.codec import CodecError, atomic_write, decode, encode
from fedalt.core.reading import read_bytes
from fedalt.engine.changes import ReferenceLackedError, Sent, whole
from fedalt.engine.client_work import ClientWork
from fedalt.engine.firewall import check_broadcast
from fedalt.engine.local_trainer import LocalTrainer
from fedalt.engine.schedule import Arm
from fedalt.engine.states import client_of
from fedalt.engine.traffic import Coding
from fedalt.federation.accepted import Accepted, folder_of
from fedalt.federation.agreement import Agreement
from fedalt.federation.answer_schema import asked_of, check_answer, has_base
from fedalt.federation.call_checks import CallRefused, check_call, lasts, read_call, told_outside
from fedalt.federation.client_states import keep, received, settle
from fedalt.federation.messages import NEVER, Answer, Call, Cost, RoundKeys, Score, SumCall, digest
from fedalt.federation.owner_messages import Say, silent, what_was_done, what_was_rejected, where
from fedalt.federation.privacy import own_spending
from fedalt.federation.secure_client import SecureClient
from fedalt.methods.contract import AnyMethod, Message
from fedalt.runs.budget import RunBudget
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.observer import Observers
from fedalt.runs.setup import Parts, base_arm

_log: Final = logging.getLogger(__name__)  # on standard error, where nobody says otherwise


@dataclass(frozen=True)
class Client:
    """A client whose model is loaded and whose data are read. Use it within `locked(folder)`."""

    agreement: Agreement
    client_id: str
    parts: Parts
    trainer: LocalTrainer
    folder: Path
    accepted: Accepted
    say: Say = silent
    budget: RunBudget | None = None
    secure: SecureClient | None = None

    def answer(self, data: bytes) -> bytes:
        """What to send back: to the same call the same bytes, to a bad one why it is refused.

        `say` is told of it, and of all that hinders it.
        """
        if self.secure is not None:
            with suppress(CodecError):  # a call of another kind, or none, which is told below
                return self.secure.answer(decode(SumCall, data, finite=True), data)
        call_digest = digest(data)
        answer = Answer(
            self.agreement.name, self.agreement.digest, self.client_id, NEVER, NEVER, call_digest
        )
        rounds, place = self.agreement.settings.rounds.rounds, "a call of the server"
        counted = self.accepted.begun
        try:
            old, known = self._last_answer()
            if known is not None and known.call == call_digest:
                self.say("the server asks once more; it gets the same answer")
                return old
            call = read_call(data, self.agreement, self.client_id)
            place = where(call, rounds)
            answer = replace(answer, round=call.round, accepted=call.accepted)
            since = NEVER if known is None else known.round
            behind = call.accepted < self.accepted.round
            if self.accepted.may_go_back and (behind or call.round < since):
                since = NEVER
                if behind:  # else what counts is the same, and only rounds without it came since
                    self.say(f"{place}: {self.accepted.go_back(self.client_id, call.accepted)}")
                if self.secure is not None:
                    self.secure.forget()
            self._require_counted(call)
            check_call(call, self.agreement, self.client_id, since)
            call = received(self.accepted, call, self._coding(self.agreement.settings.method))
            done = self._execute(call, answer)
            check_answer(done, asked_of(call, call_digest, self.agreement), self.agreement)
            sent = encode(done)
            atomic_write(self.folder / "answer.bin", sent)
        except Exception as error:  # a client that ends with an error could be called to death
            # Each try would spend as much of a client's privacy as a round that counts.
            over = lasts(error) or self.accepted.begun > counted
            return self._unable(replace(answer, over=over), place, error)
        if told := what_was_done(call, done, len(sent), rounds):
            self.say(told)
        return sent

    def _unable(self, answer: Answer, place: str, error: Exception) -> bytes:
        """The answer that there is none: the server hears no path and no data, the owner all."""
        named = str(error)
        if isinstance(error, OSError) and error.filename:
            named = f"{error.filename}: {error.strerror}"
        then = "it sits this round out" if answer.over else "the server asks it again"
        self.say(f"{place}: this client could not answer: {named}; {then}")
        if not isinstance(error, ValueError | OSError):
            _log.error("%s: %s", self.client_id, error, exc_info=True)
        lacks = isinstance(error, ReferenceLackedError)
        answer = replace(answer, upload=None, keys=None, scores=(), costs=(), lacks=lacks)
        return encode(replace(answer, error=self._told(error)))

    def _told(self, error: Exception) -> str:
        """What the server is told of an error, without paths of this machine."""
        settings = self.parts.settings
        mine = [self.folder, settings.data.path, Path(settings.model.name), Path.home(), Path.cwd()]
        mine += [path.absolute() for path in mine]
        return told_outside(error, self.client_id, mine, state=self.folder)

    def _last_answer(self) -> tuple[bytes, Answer | None]:
        """The last answer, as it was sent; a damaged file is none."""
        file = self.folder / "answer.bin"
        data = read_bytes(file) if file.exists() else b""
        try:
            return data, decode(Answer, data)
        except CodecError:
            return data, None

    def _execute(self, call: Call, answer: Answer) -> Answer:
        if self.secure is not None and call.train:
            self.secure.require_new(call.round)
        self._require_fitting(call)
        if rejected := what_was_rejected(self.folder, self.client_id, call):
            self.say(f"{where(call, self.agreement.settings.rounds.rounds)}: {rejected}")
        settle(self.accepted, call, self.agreement.columns)
        keep(self.accepted, call, self.agreement.settings)
        scores: list[Score] = []
        costs: list[Cost] = []
        upload, keys = None, None
        for arm in self.parts.arms:
            if arm.column in call.score:
                scores += self.score(arm, call, call.score[arm.column])
        if call.split == "test" and "own" in call.score and has_base(self.agreement):
            scores += self.score_base(call)
        if call.train:
            for arm in self.parts.arms:
                sent, cost = self._train(arm, call)
                costs.append(cost)
                if arm.column == "own":
                    upload, keys = self._withheld(call, sent)
            self.accepted.write(self.accepted.round)  # with the digests of what was trained
        self.accepted.may_go_back = False  # that was once
        return replace(answer, upload=upload, keys=keys, scores=tuple(scores), costs=tuple(costs))

    def _withheld(self, call: Call, upload: Sent) -> tuple[Sent | None, RoundKeys | None]:
        """What is sent of an upload: itself, or the keys of the sum that it will be part of."""
        if self.secure is None:
            return upload, None
        return None, self.secure.begin(call.round, whole(upload), whole(call.message))

    def _require_counted(self, call: Call) -> None:
        """Refuse a server that has forgotten what it said, or counts what is not here."""
        known = self.accepted.round
        if call.accepted < known:
            last = f"round {call.accepted + 1} was the last to count"
            raise CallRefused(
                f"client {self.client_id!r}: the server says that "
                f"{'no round has counted' if call.accepted == NEVER else last}, but it said "
                f"{known + 1} before; nothing was changed. It was set back to an older state, or "
                "this is an old message. Where its operator has restored a backup, `fedalt client "
                "--go-back` follows it"
            )
        mine = self.accepted.kept.newest(self.folder / "clients" / self.client_id, call.accepted)
        is_there = mine is not None and int(mine.stem) == call.accepted
        if call.accepted != NEVER and not is_there and not call.last:
            raise CallRefused(
                f"client {self.client_id!r}: the server counts an upload of round "
                f"{call.accepted + 1}, but this client has no state of it; restore its folder from "
                "a backup, or let the server's operator take the client out"
            )

    def _require_fitting(self, call: Call) -> None:
        """Refuse a broadcast before anything is computed with it."""
        method = self.agreement.settings.method
        scored = call.score.get("own", call.accepted)
        for round_ in {call.accepted, min(scored, call.accepted)}:
            states = self._states("own", round_ + 1)
            client = client_of(method, self.parts.init, states, self.client_id)
            check_broadcast(whole(call.message), method, self.parts.init, client)

    def score(self, arm: Arm, call: Call, round_: int) -> list[Score]:
        """Score what the client serves after a round; on test data also the shared part."""
        whole = call.split == "test"
        work = self._work(arm, call, round_, min(round_, call.accepted) + 1)
        scored = work.score([self.client_id], split=call.split, whole=whole)
        if not scored:
            return []
        return [
            Score(column, call.split, round_, metrics)
            for column, metrics in scored[0].metrics.items()
        ]

    def score_base(self, call: Call) -> list[Score]:
        """Score the base model as it is, if it has a score."""
        base = base_arm(self.parts)
        return [] if base is None else self.score(base, call, NEVER)

    def _train(self, arm: Arm, call: Call) -> tuple[Sent, Cost]:
        """The client's half of a round; its new state stays here, its upload is returned."""
        budget = self.budget if arm.column == "own" else None
        spent = own_spending(budget, self.client_id, self.accepted)  # before anything is computed
        (upload,) = self._work(arm, call, call.round, call.round).train([self.client_id])
        return upload.message, Cost(arm.column, {**upload.metrics, **spent}, upload.seconds)

    def _work(self, arm: Arm, call: Call, round_: int, at: int) -> ClientWork:
        """The client's work in a round, on its states as round `at` finds them."""
        states, message = self._states(arm.column, at), self._message(arm, call)
        budget = self.budget if arm.column == "own" else None
        protection = None if budget is None else budget.protection(call.clip or None)
        return ClientWork(
            arm,
            self.parts.init,
            self.trainer,
            states,
            round_,
            sent=lambda _: message,
            on_event=Observers().on_event,  # its owner is told of calls
            protection=protection,
            coding=self._coding(arm.method),
            expecting=call.expected or None,
        )

    def _coding(self, method: AnyMethod) -> Coding:
        return Coding(method, self.parts.init, self.agreement.settings.traffic)

    def _message(self, arm: Arm, call: Call) -> Message:
        """What the server sent, or, for the baseline, what a server without clients would send."""
        if arm.column == "own":
            return whole(call.message)
        return arm.method.broadcast(arm.method.init_server(self.parts.init), self.client_id)

    def _states(self, column: str, round_: int) -> FileStates:
        return FileStates(folder_of(self.folder, column), round_, kept=self.accepted.kept)
