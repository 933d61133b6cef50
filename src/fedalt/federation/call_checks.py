"""What a client does not carry out, and what it says of it: nothing here trusts the server."""

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Final

from fedalt.core.codec import CodecError, decode
from fedalt.core.foreign import shown
from fedalt.core.upload_settings import Privacy
from fedalt.engine.changes import ReferenceLackedError
from fedalt.engine.firewall import Refused, quoted
from fedalt.engine.privacy import PrivacyError
from fedalt.engine.schedule import Schedule
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import NEVER, Answer, Call
from fedalt.federation.secure_sum import SecureSumError, StepOverError
from fedalt.training.group import TrainingError

# After the last round it is scored, then tested, then everyone is told that it has ended.
_SCORED: Final = 0
_TESTED: Final = 1
_ENDED: Final = 2


class CallRefused(ValueError):  # noqa: N818 - a verdict, no mistake of ours
    """A call that is not carried out, and why: in words that may be sent to the server."""


def read_call(data: bytes, agreement: Agreement, client_id: str) -> Call:
    """The call in these bytes, if it is for this client, of this federation, under its terms."""
    try:
        call = decode(Call, data, finite=True)
    except CodecError as error:
        raise CallRefused(f"client {client_id!r}: the call cannot be read: {error}") from error
    for what, theirs, ours in (
        ("federation", call.federation, agreement.name),
        ("client", call.client, client_id),
        ("terms", call.terms, agreement.digest),
    ):
        if theirs != ours:
            raise CallRefused(
                f"client {client_id!r}: the call is for {what} {quoted(theirs)}, "
                f"but this is {ours!r}"
            )
    return call


def check_call(call: Call, agreement: Agreement, client_id: str, since: int) -> None:
    """Refuse a call that no server sends which keeps to the agreement, before anything comes of it.

    `since` is the round of the last call that the client has answered, before which it is not set
    back.
    """
    settings, columns = agreement.settings, agreement.columns
    problems = _problems(call, settings.rounds, columns, since), _clipping(call, settings.privacy)
    for problem in chain.from_iterable(problems):
        raise CallRefused(f"client {client_id!r}: the call is refused: {problem}")


def is_last(data: bytes, answer: bytes) -> bool:
    """Whether a call says that nothing comes after it, and this answer does not refuse it."""
    try:
        return decode(Call, data).last and not decode(Answer, answer).error
    except CodecError:
        return False


def _problems(
    call: Call, schedule: Schedule, columns: Collection[str], since: int
) -> Iterable[str]:
    """What is wrong with a call, in the words of whoever reads it."""
    end, round_ = schedule.rounds, call.round
    if not 0 <= round_ <= end + _ENDED:
        yield f"round {round_ + 1}, but the terms are about {end} rounds"
    if round_ < since:
        yield (
            f"round {round_ + 1}, but round {since + 1} was answered already, and rounds only go "
            "forward"
        )
    if not NEVER <= call.accepted < min(round_, end):
        yield f"round {call.accepted + 1} cannot have counted before round {round_ + 1}"
    if call.train and round_ >= end:
        yield f"training in round {round_ + 1}, but the last one is {end}"
    if not (call.train or call.score or call.last):
        yield "there is nothing to do"
    if call.last and (call.train or call.score or round_ != end + _ENDED):
        yield "it says that nothing comes after it, but it is no farewell"
    if round_ == end + _ENDED and not call.last:
        yield f"round {round_ + 1}, in which there is nothing but a farewell"
    yield from _columns("keep", call.keep, columns)
    yield from _columns("score", call.score, columns)
    for column, kept in call.keep.items():
        if not 0 <= kept < min(round_, end):
            yield (
                f"to keep round {kept + 1} of column {column!r}, which is not over in round "
                f"{round_ + 1}"
            )
    if call.split == "test":
        yield from _test_problems(call, schedule)
    else:
        yield from _validation_problems(call, schedule)


def _clipping(call: Call, privacy: Privacy) -> Iterable[str]:
    """What is wrong with a call's clip, which is there where the terms let it follow uploads."""
    follows = call.train and privacy.quantile is not None
    if follows != (call.clip > 0):
        expected = "a number above 0" if follows else "none"
        yield f"a clip of {call.clip:g}, expected {expected}"


def _columns(what: str, given: Mapping[str, int], known: Collection[str]) -> Iterable[str]:
    if unknown := given.keys() - set(known):
        yield f"to {what} column {quoted(min(unknown))}, but there are {', '.join(known)}"


def _test_problems(call: Call, schedule: Schedule) -> Iterable[str]:
    end = schedule.rounds
    if not schedule.test:
        yield "to score test data, which the terms leave alone"
    if call.train or call.last or call.round != end + _TESTED:
        yield f"to score test data in round {call.round + 1}, but that is done after the last one"
    for column, round_ in call.score.items():
        best = call.keep.get(column, end - 1) if schedule.select == "best" else end - 1
        if round_ != best:
            yield (
                f"to test round {round_ + 1} of column {column!r}, but the chosen one is {best + 1}"
            )


def _validation_problems(call: Call, schedule: Schedule) -> Iterable[str]:
    end = schedule.rounds
    if call.score and call.round > end + _SCORED:
        yield f"to score validation data in round {call.round + 1}, after the last one"
    if call.score and call.round < end and call.round % schedule.evaluate_every:
        yield (
            f"to score in round {call.round + 1}, but that is done every {schedule.evaluate_every}"
        )
    for column, round_ in call.score.items():
        if round_ != call.round - 1 or round_ < 0:
            yield f"to score round {round_ + 1} of column {column!r} in round {call.round + 1}"


def lasts(error: Exception) -> bool:
    """Whether it will go wrong until the round is over, so that the server need not ask again."""
    return isinstance(error, PrivacyError | StepOverError)


# Where a path begins: a root, a drive, a share or a home folder, not in the middle of a name.
_PATH: Final = re.compile(r"(?<![\w.)])(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\s'\"`,:;()\[\]<>|]+")
_HIDDEN: Final = "(a path)"


def told_outside(
    error: Exception, client_id: str, private: Iterable[Path], state: Path | None = None
) -> str:
    """What a server is told of an error: one printable sentence without paths.

    What quotes nothing but the call, the terms and numbers is told as it is; of everything else,
    which may quote the client's data, only what kind of error it is. `private` are folders of the
    client's, which may have spaces in their names; of a file in `state` the own name is told, which
    fedalt has given it.
    """
    match error:
        case (
            CallRefused()
            | Refused()
            | ReferenceLackedError()
            | TrainingError()
            | PrivacyError()
            | SecureSumError()
        ):
            text = str(error)
        case OSError():  # a full disk; where that is, is nobody else's business
            file = None if error.filename is None else Path(str(error.filename))
            is_known = file is not None and state is not None and file.is_relative_to(state)
            text = f"client {client_id!r}: {error.strerror or type(error).__name__}"
            text += f": {file.name}" if file is not None and is_known else ""
        case CodecError():
            text = f"client {client_id!r}: a file of its state is damaged"
        case _:
            kind = type(error).__name__
            text = f"client {client_id!r}: {kind}; what it prints itself says more"
    for folder in sorted({str(path) for path in private if path.parts[1:]}, key=len, reverse=True):
        text = re.sub(re.escape(folder) + r"[^\s'\"`,:;]*", _HIDDEN, text)
    return shown(_PATH.sub(_HIDDEN, text))
