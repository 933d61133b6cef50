"""Taking a round's uploads in although one breaks the method: it is found and left out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fedalt.core.foreign import shown
from fedalt.core.seeds import generator
from fedalt.engine.dry_run import Form
from fedalt.engine.firewall import form_of
from fedalt.engine.screening import Arrival, Gate, Yard, take_in
from fedalt.methods.contract import AnyMethod, Message

# A round's uploads by client: True for the real one, False for a control in its place.
_Mix = Mapping[str, bool]

_SMALL: Final = 0.01  # the spread of a control's numbers


class MethodFailed(ValueError):  # noqa: N818 - the method has, whatever was uploaded
    """A method that cannot aggregate, with no upload to blame for it."""


@dataclass(frozen=True)
class _Silent:
    """A yard in which nothing is noted: what is refused while trying is not refused yet."""

    yard: Yard

    def begin(self) -> None:
        """See `Yard`."""
        self.yard.begin()

    def waiting(self) -> AbstractContextManager[Path]:
        """See `Yard`."""
        return self.yard.waiting()

    def quarantine(self, client_id: str, reason: str, data: bytes, limit: int) -> None:
        """Nothing."""


def control_of(upload: Message, forms: Sequence[Form]) -> Message:
    """A harmless upload of the same form: small random numbers, always the same ones."""
    form = form_of(upload, forms)
    tree = {
        name: (torch.randn(each.shape, generator=generator(*name)) * _SMALL).to(each.dtype)
        for name, each in form.tree.items()
    }
    return Message(tree, form.facts)


class Uploads(Protocol):
    """A round's uploads, each as often as it is asked for: they stay on disk meanwhile."""

    @property
    def clients(self) -> Sequence[str]:
        """Whose there are, sorted."""
        ...

    def arrival(self, client_id: str) -> Arrival:
        """A client's upload; its `decide` is told nothing here."""
        ...

    def control(self, client_id: str) -> Message:
        """A harmless upload of the same form, see `control_of`."""
        ...

    def decide(self, client_id: str, reason: str | None) -> None:
        """What is told of each upload once, in the end: None if it counts, else why not."""
        ...


def take_in_usable(
    method: AnyMethod, server: Any, uploads: Uploads, gate: Gate, yard: Yard
) -> Any | None:
    """Like `take_in`, but an upload with which the method fails is refused, and the rest counts.

    To fail is to raise, or to come to a state with NaN or infinity. Raises MethodFailed where no
    upload can be blamed; errors of the disk or of memory are no upload's fault and pass.
    """
    trial = _Trial(method, server, uploads, gate, yard)
    blamed: dict[str, str] = {}
    while True:
        verdicts: dict[str, str | None] = {}
        rest = [each for each in uploads.clients if each not in blamed]
        try:
            after = trial.outcome(dict.fromkeys(rest, True), gate, verdicts)
            break
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever a method makes of what it does not expect
            why = _told(error)
            left = [each for each in rest if verdicts.get(each) is None]
            found = trial.at_fault(left, why)
            if not found:
                name, who = type(method).__name__, ", ".join(left)
                raise MethodFailed(
                    f"the method {name} cannot aggregate the uploads of this round, and no client "
                    f"can be blamed for it: {why} (uploads of {shown(who)})"
                ) from error
            blamed |= {who: f"the method cannot aggregate it: {why}" for who, why in found.items()}
    for client_id in uploads.clients:
        reason = blamed.get(client_id, verdicts.get(client_id))
        if reason is not None:
            data = uploads.arrival(client_id).data
            yard.quarantine(client_id, reason, data, gate.firewall.quarantine_bytes)
        if client_id in blamed or client_id in verdicts:
            uploads.decide(client_id, reason)
    return after


@dataclass(frozen=True)
class _Trial:
    """Tries the method with parts of a round's uploads, to find out which one breaks it."""

    method: AnyMethod
    server: Any
    uploads: Uploads
    gate: Gate
    yard: Yard

    def outcome(self, mix: _Mix, gate: Gate, verdicts: dict[str, str | None]) -> Any | None:
        """The state after this mix; what the gate says of each upload is put into `verdicts`."""

        def noting(client_id: str) -> Callable[[str | None], None]:
            return lambda reason: verdicts.update({client_id: reason})

        def arrivals() -> Iterator[Arrival]:
            for each, real in mix.items():
                if real:
                    yield replace(self.uploads.arrival(each), decide=noting(each))
                else:
                    yield Arrival(each, self.uploads.control(each), b"", None, noting(each))

        after = take_in(self.method, self.server, arrivals(), gate, _Silent(self.yard))
        if not all(bool(tensor.isfinite().all()) for tensor in _tensors(after)):
            raise ArithmeticError("the state that it comes to has NaN or infinity")
        return after

    def at_fault(self, clients: Sequence[str], why: str) -> dict[str, str]:
        """Who is to blame and why; nobody where it cannot be told.

        An upload is at fault if the method fails with it among harmless ones, else if it fails
        with it alone (but not with everyone's), else if it does not fail without it.
        """
        harmless = dict.fromkeys(clients, False)
        failed = self._failed({each: {**harmless, each: True} for each in clients})
        if failed and self._failure(harmless) is None:
            return failed
        failed = self._failed({each: {each: True} for each in clients})
        if failed and len(failed) < max(2, len(clients)):
            return failed
        everyone = dict.fromkeys(clients, True)
        failed = self._failed(
            {each: {k: v for k, v in everyone.items() if k != each} for each in clients}
        )
        return {each: why for each in clients if each not in failed}

    def _failed(self, tries: Mapping[str, _Mix]) -> dict[str, str]:
        whys = {each: self._failure(mix) for each, mix in tries.items()}
        return {each: why for each, why in whys.items() if why is not None}

    def _failure(self, mix: _Mix) -> str | None:
        """Why the method fails with this mix, if it does."""
        gate = replace(self.gate, firewall=replace(self.gate.firewall, norm_limit=None))
        try:
            self.outcome(mix, gate, {})
        except (OSError, MemoryError):
            raise
        except Exception as error:
            return _told(error)
        return None


def _told(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {error}")


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case Mapping():
            for each in value.values():
                yield from _tensors(each)
        case _ if is_dataclass(value):
            yield from _tensors(vars(value))
