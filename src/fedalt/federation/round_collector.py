"""What a federation's server collects in a round: calls out, answers in, checked and on disk."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from fedalt.core.codec import CodecError, atomic_write, decode, encode, read
from fedalt.core.files import make_private_folder
from fedalt.core.foreign import shown
from fedalt.core.reading import read_bytes
from fedalt.engine.changes import Change, Sent, whole
from fedalt.engine.firewall import Refused, Screening, check_size
from fedalt.engine.traffic import Coding
from fedalt.engine.uploads import Upload
from fedalt.federation.agreement import Agreement
from fedalt.federation.answer_forms import AnswerForms, Late, counts, require_counting
from fedalt.federation.answer_schema import Asked, asked_of, check_answer
from fedalt.federation.messages import NEVER, Answer, Call, digest
from fedalt.federation.owner_messages import Say
from fedalt.federation.rules import Rules
from fedalt.federation.secure_keys import Signatures
from fedalt.federation.status_file import StatusFile
from fedalt.federation.transport import Lost, Transport
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import RunFolder

_REST: Final = 30.0  # seconds before a client that could not do it is asked again

Called = dict[str, list[Asked]]  # of each client, the calls that it has not answered yet


@dataclass
class RoundCollector:
    """The round in progress; what it holds can be had again from the disk and the transport.

    `folder` and `states` are the run's. Uploads stay on disk: `answers` hold all but them,
    `uploaded` are their clients, `downloads` the calls' bytes. `signatures` tell whose
    keys of a secure sum are whose, where there is one.
    """

    agreement: Agreement
    coding: Coding
    states: FileStates
    folder: Path
    transport: Transport
    rules: Rules
    screening: Screening
    say: Say
    round: int
    called: Called
    signatures: Signatures | None = None
    answers: dict[str, Answer] = field(default_factory=dict)
    uploaded: set[str] = field(default_factory=set)
    downloads: dict[str, int] = field(default_factory=dict)
    _calls: Mapping[str, Call] = field(default_factory=dict)
    _sent: Callable[[str], Sent] | None = None
    _in_vain: dict[str, int] = field(default_factory=dict)  # bytes of a change that was no use
    _digests: dict[str, str] = field(default_factory=dict)
    _asked: dict[str, Asked] = field(default_factory=dict)
    _heard: dict[str, float] = field(default_factory=dict)  # when, in seconds of the epoch
    _unable: dict[str, tuple[str, float]] = field(default_factory=dict)  # why, since when
    _trying: set[str] = field(default_factory=set)  # called, and has not said since that it cannot
    _over: set[str] = field(default_factory=set)  # of the unable, who will not do this round at all

    def gather(
        self,
        calls: Mapping[str, Call],
        sent: Callable[[str], Sent] | None = None,
        cohort: Collection[str] = (),
    ) -> None:
        """Call clients as they come online until all have answered, or it has taken too long.

        `cohort` are those that are to train; `sent` is how each call's message is sent.
        """
        self.resume(calls, sent)
        began, overdue, told = time.monotonic(), False, False
        limit = self.rules.deadline
        while missing := self._missing():
            least = min(self.rules.minimum, len(set(cohort) - self._over))
            enough = len(self.uploaded) >= least
            filled = cohort and len(self.uploaded) >= (self.rules.buffer or len(cohort) + 1)
            if filled or (enough and (overdue or missing <= self._unable.keys() - self._trying)):
                self._tell(f"goes on without {', '.join(sorted(missing))}")
                return
            if overdue and not told:
                self._tell(
                    f"the deadline is over, but only {len(self.uploaded)} of at least {least} "
                    "uploads are there; waiting on"
                )
                told = True
            online = self.transport.online()
            waiting = sorted((missing & online) - self._over)
            free = [client_id for client_id in waiting if self._is_free(client_id)]
            self.transport.send((client_id, self._encoded(client_id)) for client_id in free)
            self._trying.update(free)
            for client_id in free:
                self.called.setdefault(client_id, []).append(self.asked(client_id))
            for client_id, came in self.transport.receive():
                self._take(client_id, came)
            self._show(online, self._missing())
            overdue = limit is not None and time.monotonic() - began > limit

    def resume(self, calls: Mapping[str, Call], sent: Callable[[str], Sent] | None = None) -> None:
        """What of these calls had been answered before the process was killed; nobody is called.

        Whoever sent what is no answer to this round's call, or none at all, is called again.
        """
        self._calls, self._sent = calls, sent
        self._heard = self.status.heard() | self._heard
        for client_id in calls:
            file = self.answer_file(client_id)
            data = read_bytes(file) if file.exists() else b""
            try:
                answer = self._checked(client_id, data, None) if data else None
            except Refused as error:
                file.unlink()
                self._tell(f"{client_id}: its answer on disk is dropped: {error}")
                continue
            if answer is not None and not answer.error:
                self._note(client_id, answer)

    def heard(self) -> list[str]:
        """Who has answered this round's call, and so has what it sent."""
        return [who for who, answer in self.answers.items() if answer.round == self.round]

    def answer_file(self, client_id: str) -> Path:
        """Where a client's answer of this round lies as it came; empty if it was refused."""
        return self.incoming / f"{client_id}.bin"

    def uploads(self) -> Iterator[Upload]:
        """The uploads of this round, sorted by client, out of the answers as they came."""
        for client_id in sorted(self.uploaded):
            file = self.answer_file(client_id)
            message = read(Answer, file, of=read_bytes).upload
            assert message is not None
            (own,) = (cost for cost in self.answers[client_id].costs if cost.column == "own")
            sent = self.downloads.get(client_id, 0)
            rounds = self.round - self.answers[client_id].round
            less = counts(rounds, self.rules, averages=self.agreement.settings.method.averages)
            yield Upload(client_id, message, own.seconds, own.metrics, sent, str(file), less)

    @property
    def incoming(self) -> Path:
        """The folder of the round's answers."""
        return self.folder / "incoming" / f"{self.round:04d}"

    @cached_property
    def status(self) -> StatusFile:
        """What `fedalt federation status` reads."""
        return StatusFile(self.folder / "status.json", self.agreement.settings.rounds.rounds)

    @cached_property
    def _forms(self) -> AnswerForms:
        return AnswerForms(self.agreement, self.coding, self.states, self.signatures)

    def _missing(self) -> set[str]:
        """Who has not answered yet, of those who still take part."""
        return self._calls.keys() - self.answers.keys() - RunFolder(self.folder).left()

    def _is_free(self, client_id: str) -> bool:
        """Whether a client has no call to answer first and did not just say that it cannot."""
        if client_id in self._unable and time.monotonic() - self._unable[client_id][1] < _REST:
            return False
        calls = self.called.get(client_id, [])
        if self.rules.late == "count":
            return not calls
        return all(asked.round != self.round for asked in calls)

    def _encoded(self, client_id: str) -> bytes:
        """A call's bytes. They are made when they are needed: calls share what they have in common.

        What tells the call apart, and its size, stay.
        """
        call, sent = self._calls[client_id], self._sent
        if sent is not None and client_id not in self._in_vain:
            call = replace(call, message=sent(client_id))
        data = encode(call)
        self._digests[client_id] = digest(data)
        self.downloads[client_id] = self._in_vain.get(client_id, 0) + len(data)
        return data

    def _digest(self, client_id: str) -> str:
        if client_id not in self._digests:
            self._encoded(client_id)
        return self._digests[client_id]

    def asked(self, client_id: str) -> Asked:
        """What a client's call of this round asks for."""
        if client_id not in self._asked:
            call, digest_ = self._calls[client_id], self._digest(client_id)
            self._asked[client_id] = asked_of(call, digest_, self.agreement)
        return self._asked[client_id]

    def _take(self, client_id: str, came: bytes | Lost) -> None:
        """Put an answer on disk if it is one that counts, or say why not."""
        calls = self.called.get(client_id, [])
        asked = calls.pop(0) if calls else None  # calls are answered one after the other
        if isinstance(came, Lost):
            self._tell(f"{client_id}: {shown(came.reason)}")
            return
        self._heard[client_id] = time.time()
        if client_id in self.answers:
            return
        try:
            answer = self._checked(client_id, came, asked)
        except Late as late:
            if asked and (asked.trains or asked.scores):  # not a step of a sum that did without it
                self._tell(f"{client_id}: late: {late}")
            return
        except Refused as error:
            limit = self.screening.firewall.quarantine_bytes
            self.states.quarantine(client_id, str(error), came, limit)
            self._tell(f"{client_id}: refused: {error}")
            if asked is not None and asked.round < self.round:
                return  # its turn in this round is still to come
            about = self.agreement.name, self.agreement.digest, client_id, self.round, NEVER, ""
            self._keep(client_id, Answer(*about), b"")
            return
        if answer.lacks and client_id not in self._in_vain:
            self._send_whole(client_id)
            self._tell(f"{client_id}: {shown(answer.error)}; it is sent the whole message")
            return
        if answer.error:
            answer = replace(answer, error=shown(answer.error))
            if self._unable.get(client_id, ("", 0.0))[0] != answer.error:
                self._tell(f"{client_id}: {answer.error}")
            self._unable[client_id] = answer.error, time.monotonic()
            self._trying.discard(client_id)
            self._over |= {client_id} if answer.over else set()
            return
        self._keep(client_id, answer, came)

    def _send_whole(self, client_id: str) -> None:
        """Call a client with the whole message: it lacks what its first call was a change of."""
        self._in_vain[client_id] = self.downloads[client_id]
        del self._digests[client_id]
        self._asked.pop(client_id, None)

    def _was_sent_whole(self, client_id: str, answer: Answer) -> bool:
        """Whether an answer from before a kill may be one to the whole message: it is to no other.

        Who was sent it is known of those alone that have lacked something since.
        """
        if client_id in self._in_vain or answer.call == self._digest(client_id):
            return False
        return self._sent is not None and isinstance(self._sent(client_id), Change)

    def _keep(self, client_id: str, answer: Answer, data: bytes) -> None:
        """Put a client's answer of this round on disk."""
        self._unable.pop(client_id, None)
        file = self.answer_file(client_id)
        make_private_folder(file.parent)
        atomic_write(file, data)
        self._note(client_id, answer)

    def _note(self, client_id: str, answer: Answer) -> None:
        if answer.upload is not None or answer.keys is not None:
            self.uploaded.add(client_id)
        self.answers[client_id] = replace(answer, upload=None)

    def _checked(self, client_id: str, data: bytes, asked: Asked | None) -> Answer:
        """The answer in these bytes, if it is one to what was asked and may count.

        `asked` is the oldest call that the client has not answered, None if there is none. Raises
        Late or Refused.
        """
        check_size(len(data), self.screening.firewall.max_upload_bytes)
        late = asked is not None and asked.round < self.round
        if asked is not None and late:
            require_counting(asked, self._calls.get(client_id), self.rules)
        if client_id not in self._calls:
            raise Refused(f"nothing was asked in round {self.round + 1}")
        try:
            answer = decode(Answer, data, finite=True)
        except CodecError as error:
            raise Refused(f"it cannot be read: {error}") from error
        if asked is None and self._was_sent_whole(client_id, answer):
            self._send_whole(client_id)
        check_answer(answer, asked or self.asked(client_id), self.agreement)
        if answer.error and late:
            raise Late(f"in round {answer.round + 1} it could not: {answer.error}")
        self._forms.require(client_id, answer, whole(self._calls[client_id].message), late=late)
        if late:
            self._tell(
                f"{client_id}: late: its upload of round {answer.round + 1} counts in this one"
            )
        return answer

    def _show(self, online: Collection[str], missing: Collection[str]) -> None:
        unable = {client_id: why for client_id, (why, _) in self._unable.items()}
        self.status.show(self.round, self._heard, online, missing, unable)

    def _tell(self, text: str) -> None:
        rounds = self.agreement.settings.rounds.rounds
        when = f"round {self.round + 1}" if self.round < rounds else f"after round {rounds}"
        self.say(f"{when}: {text}")
