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
from pathlib import Path
from typing import Any, Final

from fedalt.core.codec import CodecError, atomic_write, decode, encode
from fedalt.core.files import make_private_folder
from fedalt.core.foreign import shown
from fedalt.core.reading import read_bytes, read_json
from fedalt.engine.firewall import Refused, check_size
from fedalt.federation.answer_schema import Asked
from fedalt.federation.messages import NEVER, Step, SumAnswer, SumCall, digest
from fedalt.federation.round_collector import RoundCollector
from fedalt.federation.secure_sum import SecureSumError, StepOverError, require_enough
from fedalt.federation.transport import Lost
from fedalt.runs.folder import RunFolder

_REST: Final = 30.0  # seconds before a client that could not do it is asked again


@dataclass
class SumCalls:
    """Calls the clients of a round's sum, after the `collector` has heard who has trained.

    `traffic` counts the bytes that each has sent and was sent.
    """

    collector: RoundCollector
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)

    def tell(self, text: str, step: Step | None = None) -> None:
        """Tell the operator of the round, or of one of its steps."""
        at = f"round {self.collector.round + 1}" + (f", {step}" if step else "")
        self.collector.say(f"{at}: {text}")

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
        return self.collector.incoming / step

    def call(self, client_id: str, step: Step, **about: Any) -> SumCall:
        """The call of a step to a client."""
        agreement, round_ = self.collector.agreement, self.collector.round
        return SumCall(agreement.name, agreement.digest, client_id, round_, step, **about)

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
        collector, transport = self.collector, self.collector.transport
        limit, heard = collector.rules.deadline, collector.status.heard()
        while missing := calls.keys() - answers.keys() - over - RunFolder(collector.folder).left():
            if enough is not None and len(answers) >= enough:
                break
            if limit is not None and time.monotonic() - began > limit:
                self.tell(f"goes on without {', '.join(sorted(missing))}", step)
                break
            resting = {who for who, (_, at) in unable.items() if time.monotonic() - at < _REST}
            waiting = {who for who in missing if self._awaited(who, digests[who])}
            online = transport.online()
            free = sorted((missing & online) - resting - waiting)
            self._send({who: (data[who], digests[who]) for who in free})
            for who, came in transport.receive():
                asked = collector.called[who].pop(0) if collector.called.get(who) else None
                if asked is None or asked.digest != digests.get(who) or who in answers:
                    continue  # late: the step or the round that it is of goes on without it
                if isinstance(came, Lost):
                    self.tell(f"{who}: {shown(came.reason)}", step)
                    continue
                heard[who] = time.time()
                try:
                    answers[who] = self._answer(came, who, digests[who], check)
                except (SecureSumError, Refused, CodecError) as error:
                    over |= {who} if isinstance(error, StepOverError) else set()
                    told = shown(str(error))
                    if unable.get(who, ("", 0.0))[0] != told:
                        self.tell(f"{who}: {told}", step)
                    unable[who] = told, time.monotonic()
                    continue
                unable.pop(who, None)
                atomic_write(self._place(step) / f"{who}.bin", came)
                self._count(who, up=len(came))
            why = {who: told for who, (told, _) in unable.items()}
            collector.status.show(
                collector.round, heard, online, missing - answers.keys() - over, why
            )
        require_enough(answers, needed, f"have answered the call to {step}")
        return answers

    def _send(self, calls: Mapping[str, tuple[bytes, str]]) -> None:
        """Send bytes of this digest to each of these clients."""
        collector = self.collector
        collector.transport.send((who, data) for who, (data, _) in calls.items())
        for who, (data, call_digest) in calls.items():
            asked = Asked(who, collector.round, NEVER, call_digest, (), {}, "validation")
            collector.called.setdefault(who, []).append(asked)
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
                    self.tell(f"{who}: its answer on disk is dropped: {error}")
                    file.unlink()
                    continue
                self._count(who, up=len(data))
        return answers

    def _answer(
        self, came: bytes, who: str, wanted: str, check: Callable[[SumAnswer], None]
    ) -> SumAnswer:
        """An answer that is one to what was asked. Raises SecureSumError, Refused, CodecError."""
        agreement = self.collector.agreement
        check_size(len(came), self.collector.screening.firewall.max_upload_bytes)
        answer = decode(SumAnswer, came)
        about = (answer.federation, answer.terms, answer.client, answer.round, answer.call)
        if about != (agreement.name, agreement.digest, who, self.collector.round, wanted):
            raise SecureSumError("it answers another call")
        if answer.error:
            raise (StepOverError if answer.over else SecureSumError)(answer.error)
        check(answer)
        return answer

    def _awaited(self, who: str, wanted: str) -> bool:
        return any(asked.digest == wanted for asked in self.collector.called.get(who, ()))

    def _count(self, who: str, *, up: int = 0, down: int = 0) -> None:
        before = self.traffic.get(who, (0, 0))
        self.traffic[who] = before[0] + up, before[1] + down
