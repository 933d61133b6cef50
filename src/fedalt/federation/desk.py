"""One round's correspondence of a federation's server: calls out, answers in, checked, on disk."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from fedalt.codec import CodecError, atomic_write, decode, encode, read
from fedalt.disk.reading import read_bytes
from fedalt.engine.firewall import Refused, check_size, check_upload
from fedalt.engine.gate import Gate
from fedalt.engine.in_process import encoded
from fedalt.engine.rehearsal import rehearse
from fedalt.federation.channel import Channel, Lost
from fedalt.federation.messages import NEVER, Answer, Call, digest
from fedalt.federation.terms import Terms
from fedalt.files import make_private_folder
from fedalt.methods.contract import Message
from fedalt.states import FileStates
from fedalt.store import RunFolder

_REST: Final = 30.0  # seconds before a client that could not do it is asked again
_SHOWN: Final = 1.0  # seconds between two status files
_REFUSED: Final = "refused"

Say = Callable[[str], None]
Called = dict[str, list[int]]  # of each client, the rounds of the calls it has not answered yet


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the server's operator decides alone.

    After `deadline` seconds a round ends with the uploads that are there, if they are at least
    `minimum`; without a deadline it waits for its whole cohort, but for clients that say that they
    cannot: those are asked again as long as others are waited for. An upload that comes after its
    round counts in the next one, or is dropped.
    """

    deadline: float | None = None
    minimum: int = 1
    late: Literal["count", "drop"] = "drop"

    def __post_init__(self) -> None:
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline={self.deadline}, but it is above 0 seconds")
        if self.minimum < 1:
            raise ValueError(f"minimum={self.minimum}, but a round needs an upload")


@dataclass
class Desk:
    """The round in progress; what it holds can be had again from the disk and the channel.

    `folder` is the run's. Uploads stay on disk: `answers` hold all but them, `uploads` their sizes
    in bytes, `downloads` those of the calls.
    """

    terms: Terms
    folder: Path
    channel: Channel
    rules: Rules
    gate: Gate
    say: Say
    round: int
    called: Called
    answers: dict[str, Answer] = field(default_factory=dict)
    uploads: dict[str, int] = field(default_factory=dict)
    downloads: dict[str, int] = field(default_factory=dict)
    _calls: Mapping[str, Call] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _heard: dict[str, float] = field(default_factory=dict)  # when, in seconds of the epoch
    _unable: dict[str, tuple[str, float]] = field(default_factory=dict)  # why, since when
    _shown: tuple[float, object] = (0.0, None)

    def gather(
        self,
        calls: Mapping[str, Call],
        cohort: Collection[str] = (),
        *,
        patience: float | None = None,
    ) -> None:
        """Call clients as they come online until all have answered, or it has taken too long.

        `cohort` are those that are to train; `patience` takes the place of the rules' deadline.
        """
        self._calls = calls
        self._resume()
        began = time.monotonic()
        limit = self.rules.deadline if patience is None else patience
        least = min(self.rules.minimum, len(cohort))
        told = False
        while missing := self._missing():
            if missing <= self._unable.keys() and len(self.uploads) >= least:
                self._tell(f"goes on without {', '.join(sorted(missing))}")
                return
            online = self.channel.online()
            free = [each for each in sorted(missing & online) if self._is_free(each)]
            self.channel.send((each, self._encoded(each)) for each in free)
            for each in free:
                self.called.setdefault(each, []).append(self.round)
            for client_id, came in self.channel.receive():
                self._take(client_id, came)
            missing = self._missing()
            self._show(online, missing)
            if not missing or limit is None or time.monotonic() - began <= limit:
                continue
            if len(self.uploads) >= least:
                self._tell(f"goes on without {', '.join(sorted(missing))}")
                return
            if not told:
                self._tell(
                    f"the deadline is over, but only {len(self.uploads)} of at least {least} "
                    "uploads are there; waiting on"
                )
                told = True

    def upload(self, client_id: str) -> tuple[bytes, Message]:
        """An answer that has an upload, as it came, and the upload."""
        data = read_bytes(self._file(client_id))
        upload = read(Answer, self._file(client_id), of=lambda _: data).upload
        assert upload is not None
        return data, upload

    def _missing(self) -> set[str]:
        """Who has not answered yet, of those who still take part."""
        return self._calls.keys() - self.answers.keys() - RunFolder(self.folder).left()

    def _is_free(self, client_id: str) -> bool:
        """Whether a client has no call to answer first and did not just say that it cannot."""
        if client_id in self._unable and time.monotonic() - self._unable[client_id][1] < _REST:
            return False
        calls = self.called.get(client_id, [])
        return not (calls if self.rules.late == "count" else self.round in calls)

    def _encoded(self, client_id: str) -> bytes:
        """A call's bytes. They are made when they are needed: calls share what they have in common.

        What tells the call apart, and its size, stay.
        """
        data = encode(self._calls[client_id])
        self._digests[client_id] = digest(data)
        self.downloads[client_id] = len(data)
        return data

    def _digest(self, client_id: str) -> str:
        if client_id not in self._digests:
            self._encoded(client_id)
        return self._digests[client_id]

    def _take(self, client_id: str, came: bytes | Lost) -> None:
        """Put an answer on disk if it is one that counts, or say why not."""
        calls = self.called.get(client_id, [])
        of = calls.pop(0) if calls else self.round  # calls are answered one after the other
        if isinstance(came, Lost):
            self._tell(f"{client_id}: {came.reason}")
            return
        self._heard[client_id] = time.time()
        if client_id in self.answers:
            return
        try:
            answer = self._checked(client_id, came, of)
        except Refused as error:
            states = FileStates(self.folder, self.round)
            states.quarantine(client_id, str(error), came, self.gate.firewall.quarantine_bytes)
            self._tell(f"{client_id}: refused: {error}")
            if of < self.round:
                return  # its turn in this round is still to come
            about = self.terms
            answer = Answer(about.name, about.digest, client_id, of, NEVER, "", error=_REFUSED)
            came = encode(answer)
        if answer.error and answer.error != _REFUSED:
            if self._unable.get(client_id, ("", 0.0))[0] != answer.error:
                self._tell(f"{client_id}: {answer.error}")
            self._unable[client_id] = answer.error, time.monotonic()
            return
        self._unable.pop(client_id, None)
        make_private_folder(self._file(client_id).parent)
        atomic_write(self._file(client_id), came)
        self._note(client_id, answer)

    def _note(self, client_id: str, answer: Answer) -> None:
        if answer.upload is not None:
            self.uploads[client_id] = len(encoded(answer.upload))
        self.answers[client_id] = replace(answer, upload=None)

    def _checked(self, client_id: str, data: bytes, of: int) -> Answer:
        """The answer in these bytes to a call of round `of`, if it may count; Refused otherwise."""
        check_size(len(data), self.gate.firewall.max_upload_bytes)
        try:
            answer = decode(Answer, data, finite=True)
        except CodecError as error:
            raise Refused(f"it cannot be read: {error}") from error
        for what, theirs, ours in (
            ("federation", answer.federation, self.terms.name),
            ("terms", answer.terms, self.terms.digest),
            ("client", answer.client, client_id),
        ):
            if theirs != ours:
                raise Refused(f"it is from {what} {theirs!r}, but {ours!r} was called")
        if client_id not in self._calls:
            raise Refused(f"nothing was asked in round {self.round}")
        call = self._calls[client_id]
        if of < self.round and not (call.train and self.rules.late == "count"):
            raise Refused(f"it is of round {of}, but this is round {self.round}")
        if answer.error:
            return answer
        if answer.round != of:
            raise Refused(f"it is of round {answer.round}, but round {of} was asked for")
        if of == self.round and answer.call != self._digest(client_id):
            raise Refused("it answers another call than the one of this round")
        if answer.accepted != call.accepted:
            raise Refused(f"it goes on from round {answer.accepted}, which is not the last counted")
        if (answer.upload is None) == call.train:
            raise Refused("it has no upload" if call.train else "an upload was not asked for")
        if answer.upload is not None:
            forms = rehearse(self.terms.settings.method, self.terms.start, client_id, call.message)
            check_upload(answer.upload, forms)
        return answer

    def _resume(self) -> None:
        """What has come of this round before the process was killed."""
        for client_id in self._calls:
            if not self._file(client_id).exists():
                continue
            try:
                answer = read(Answer, self._file(client_id), of=read_bytes)
            except CodecError:
                continue  # asked again, it answers the same
            if answer.call == self._digest(client_id):
                self._note(client_id, answer)

    def _show(self, online: Collection[str], missing: Collection[str]) -> None:
        """What `fedalt federation status` reads."""
        now, news = time.monotonic(), (set(online), set(missing), set(self._unable))
        if news == self._shown[1] and now - self._shown[0] < _SHOWN:
            return
        self._shown = now, news
        status = {
            "round": self.round,
            "rounds": self.terms.settings.rounds.rounds,
            "online": sorted(online),
            "awaited": sorted(missing),
            "heard": self._heard,
            "unable": {client_id: why for client_id, (why, _) in self._unable.items()},
            "time": time.time(),
        }
        atomic_write(self.folder / "status.json", json.dumps(status).encode())

    def _file(self, client_id: str) -> Path:
        return self.folder / "incoming" / f"{self.round:04d}" / f"{client_id}.bin"

    def _tell(self, text: str) -> None:
        self.say(f"round {self.round}: {text}")
