"""The calls of a secure sum, three after training, and their answers on disk.

    incoming/0007/share/members.json    who has trained, so who is asked to share
    incoming/0007/share/ID.bin          the answers to that as they came, and likewise `mask`, whose
    incoming/0007/unmask/...            answers hold the masked uploads, and `unmask`

The lists of clients are fixed once they are on disk: a client answers no step twice.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from fedalt.core.codec import CodecError, atomic_write, decode, encode
from fedalt.core.files import make_private_folder
from fedalt.core.foreign import shown
from fedalt.core.reading import read_bytes, read_json
from fedalt.engine.firewall import Refused, check_size
from fedalt.federation.agreement import Agreement
from fedalt.federation.answer_schema import Asked
from fedalt.federation.messages import NEVER, Step, SumAnswer, SumCall, digest
from fedalt.federation.rules import Rules
from fedalt.federation.secure_sum import SecureSumError, StepOverError, require_enough
from fedalt.federation.status_file import StatusFile
from fedalt.federation.transport import Lost, Transport
from fedalt.runs.folder import RunFolder

_REST: Final = 30.0  # seconds before a client that could not do it is asked again

Say = Callable[[str], None]


@dataclass
class SumCalls:
    """Calls the clients of one round's sum. `limit` is the most bytes of an answer.

    `called` are the calls that each client has yet to answer, this round's and earlier ones;
    `traffic` counts the bytes that each has sent and was sent.
    """

    agreement: Agreement
    folder: Path
    transport: Transport
    rules: Rules
    limit: int
    say: Say
    round: int
    called: dict[str, list[Asked]]
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def _status(self) -> StatusFile:
        return StatusFile(self.folder / "status.json", self.agreement.settings.rounds.rounds)

    def is_fixed(self, step: Step) -> bool:
        """Whether it is on disk whom a step is about."""
        return self._members(step).exists()

    def fixed(self, step: Step, now: Collection[str]) -> tuple[str, ...]:
        """Whom a step is about: as it was fixed before a restart, else those that are there now."""
        file = self._members(step)
        if not file.exists():
            make_private_folder(file.parent)
            atomic_write(file, json.dumps(sorted(now)).encode())
        return tuple(read_json(file, list[str]))

    def _members(self, step: Step) -> Path:
        return self._place(step) / "members.json"

    def _place(self, step: Step) -> Path:
        return self.folder / "incoming" / f"{self.round:04d}" / step

    def call(self, client_id: str, step: Step, **about: Any) -> SumCall:
        """The call of a step to a client."""
        return SumCall(
            self.agreement.name, self.agreement.digest, client_id, self.round, step, **about
        )

    def step(
        self,
        step: Step,
        calls: Mapping[str, SumCall],
        needed: int,
        check: Callable[[SumAnswer], None],
        enough: int | None = None,
    ) -> dict[str, SumAnswer]:
        """The answers to a step's calls: all, `enough`, or those that come before the deadline.

        Raises SecureSumError for fewer than are `needed`.
        """
        require_enough(calls, needed, f"can be asked to {step}")
        data = {who: encode(call) for who, call in calls.items()}
        digests = {who: digest(sent) for who, sent in data.items()}
        answers = self._kept(step, calls, digests, check)
        began, unable, over = time.monotonic(), dict[str, tuple[str, float]](), set[str]()
        limit, heard = self.rules.deadline, self._status.heard()
        while missing := calls.keys() - answers.keys() - over - RunFolder(self.folder).left():
            if enough is not None and len(answers) >= enough:
                break
            if limit is not None and time.monotonic() - began > limit:
                self.say(
                    f"round {self.round + 1}, {step}: goes on without {', '.join(sorted(missing))}"
                )
                break
            resting = {who for who, (_, at) in unable.items() if time.monotonic() - at < _REST}
            waiting = {who for who in missing if self._awaited(who, digests[who])}
            online = self.transport.online()
            free = sorted((missing & online) - resting - waiting)
            self._send({who: (data[who], digests[who]) for who in free})
            for who, came in self.transport.receive():
                asked = self.called[who].pop(0) if self.called.get(who) else None
                if asked is None or asked.digest != digests.get(who) or who in answers:
                    continue  # late: the step or the round that it is of goes on without it
                if isinstance(came, Lost):
                    self.say(f"round {self.round + 1}, {step}: {who}: {shown(came.reason)}")
                    continue
                heard[who] = time.time()
                try:
                    answers[who] = self._answer(came, who, digests[who], check)
                except (SecureSumError, Refused, CodecError) as error:
                    over |= {who} if isinstance(error, StepOverError) else set()
                    told = shown(str(error))
                    if unable.get(who, ("", 0.0))[0] != told:
                        self.say(f"round {self.round + 1}, {step}: {who}: {told}")
                    unable[who] = told, time.monotonic()
                    continue
                unable.pop(who, None)
                atomic_write(self._place(step) / f"{who}.bin", came)
                self._count(who, up=len(came))
            why = {who: told for who, (told, _) in unable.items()}
            self._status.show(self.round, heard, online, missing - answers.keys() - over, why)
        require_enough(answers, needed, f"have answered the call to {step}")
        return answers

    def _send(self, calls: Mapping[str, tuple[bytes, str]]) -> None:
        """Send bytes of this digest to each of these clients."""
        self.transport.send((who, data) for who, (data, _) in calls.items())
        for who, (data, call_digest) in calls.items():
            asked = Asked(who, self.round, NEVER, call_digest, (), {}, "validation")
            self.called.setdefault(who, []).append(asked)
            self._count(who, down=len(data))

    def _kept(
        self,
        step: Step,
        calls: Mapping[str, SumCall],
        digests: Mapping[str, str],
        check: Callable[[SumAnswer], None],
    ) -> dict[str, SumAnswer]:
        """What had come of a step before the process was killed."""
        answers = {}
        make_private_folder(self._place(step))
        for who in calls:
            file = self._place(step) / f"{who}.bin"
            if file.exists():
                data = read_bytes(file)
                try:
                    answers[who] = self._answer(data, who, digests[who], check)
                except (SecureSumError, Refused, CodecError) as error:
                    self.say(
                        f"round {self.round + 1}: {who}: its answer on disk is dropped: {error}"
                    )
                    file.unlink()
                    continue
                self._count(who, up=len(data))
        return answers

    def _answer(
        self, came: bytes, who: str, wanted: str, check: Callable[[SumAnswer], None]
    ) -> SumAnswer:
        """An answer that is one to what was asked. Raises SecureSumError, Refused, CodecError."""
        check_size(len(came), self.limit)
        answer = decode(SumAnswer, came)
        about = (answer.federation, answer.terms, answer.client, answer.round, answer.call)
        if about != (self.agreement.name, self.agreement.digest, who, self.round, wanted):
            raise SecureSumError("it answers another call")
        if answer.error:
            raise (StepOverError if answer.over else SecureSumError)(answer.error)
        check(answer)
        return answer

    def _awaited(self, who: str, wanted: str) -> bool:
        return any(asked.digest == wanted for asked in self.called.get(who, ()))

    def _count(self, who: str, *, up: int = 0, down: int = 0) -> None:
        before = self.traffic.get(who, (0, 0))
        self.traffic[who] = before[0] + up, before[1] + down
