"""Aggregating a round's uploads although one breaks the method: it is found and rejected."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fedalt.core.codec import read
from fedalt.core.foreign import shown
from fedalt.core.reading import StoreError
from fedalt.core.seeds import generator
from fedalt.engine.dry_run import Form
from fedalt.engine.firewall import form_of
from fedalt.engine.uploads import Spooled, UploadStore
from fedalt.methods.contract import AnyMethod, Message

FormsOf = Callable[[str, Message], Sequence[Form]]  # of a client's upload, after a broadcast

_SMALL: Final = 0.01  # the spread of a control's numbers
_NO_UPLOADS_FAULT: Final = (OSError, MemoryError, StoreError)


class MethodFailed(ValueError):  # noqa: N818 - the method has, whatever was uploaded
    """A method that cannot aggregate, with no upload to blame for it."""


def aggregate(
    method: AnyMethod,
    server: Any,
    uploads: UploadStore,
    forms_of: FormsOf,
    drowning: Callable[[Any, Mapping[str, Spooled]], Mapping[str, str]] = lambda *_: {},
) -> Any | None:
    """The server's state after the accepted uploads; None if there are none.

    An upload that is too large beside the others is rejected, and so is one with which the method
    fails: it raises, or comes to a state with NaN or infinity, or to one in which `drowning` finds
    it too large to be sent. Raises MethodFailed where no upload can be blamed; errors of the disk,
    of memory or of the run's own files are no upload's fault and pass.
    """
    trial = _Trial(method, server, uploads, forms_of)
    blamed: dict[str, str] = {}
    while True:
        rest = {
            client_id: spooled
            for client_id, spooled in uploads.accepted.items()
            if client_id not in blamed
        }
        sizes = {client_id: spooled.size for client_id, spooled in rest.items()}
        rejected = uploads.screening.outliers(sizes)
        accepted = {
            client_id: spooled for client_id, spooled in rest.items() if client_id not in rejected
        }
        try:
            after = trial.outcome(accepted) if accepted else None
            if after is None or not (found := drowning(after, accepted)):
                break
            blamed |= found
        except _NO_UPLOADS_FAULT:
            raise
        except Exception as error:  # whatever a method makes of what it does not expect
            why = _told(error)
            at_fault = trial.at_fault(accepted, why)
            if not at_fault:
                name, who = type(method).__name__, ", ".join(accepted)
                raise MethodFailed(
                    f"the method {name} cannot aggregate the uploads of this round, and no client "
                    f"can be blamed for it: {why} (uploads of {shown(who)})"
                ) from error
            blamed |= {
                client_id: f"the method cannot aggregate it: {why}"
                for client_id, why in at_fault.items()
            }
        uploads.states.drop("server")  # what the attempts have put into ledgers
    for client_id, reason in sorted({**rejected, **blamed}.items()):
        uploads.reject(client_id, reason)
    return after


@dataclass(frozen=True)
class _Trial:
    """Tries the method with parts of a round's uploads, to find out which one breaks it."""

    method: AnyMethod
    server: Any
    uploads: UploadStore
    forms_of: FormsOf

    def outcome(self, mix: Mapping[str, Spooled]) -> Any:
        """The state after these uploads."""
        after = self.method.aggregate(self.server, self.uploads.replies(mix))
        if not all(bool(tensor.isfinite().all()) for tensor in _tensors(after)):
            raise ArithmeticError("the state that it comes to has NaN or infinity")
        return after

    def at_fault(self, uploads: Mapping[str, Spooled], why: str) -> dict[str, str]:
        """Who is to blame and why; nobody where it cannot be told.

        An upload is at fault if the method fails with it among harmless ones, else if it fails
        with it alone (but not with everyone's), else if it does not fail without it.
        """
        harmless = {who: self._control(who, upload) for who, upload in uploads.items()}
        failed = self._failed((who, {**harmless, who: uploads[who]}) for who in uploads)
        if failed and self._failure(harmless) is None:
            return failed
        failed = self._failed((who, {who: uploads[who]}) for who in uploads)
        if failed and len(failed) < max(2, len(uploads)):
            return failed
        failed = self._failed(
            (who, {other: uploads[other] for other in uploads if other != who}) for who in uploads
        )
        return {who: why for who in uploads if who not in failed}

    def _control(self, client_id: str, spooled: Spooled) -> Spooled:
        """A harmless upload of the same form: small random numbers, always the same ones."""
        forms = self.forms_of(client_id, self.method.broadcast(self.server, client_id))
        form = form_of(read(Message, spooled.file), forms)
        tree = {
            name: (torch.randn(tensor.shape, generator=generator(*name)) * _SMALL).to(tensor.dtype)
            for name, tensor in form.tree.items()
        }
        return self.uploads.write(Message(tree, form.facts))

    def _failed(self, tries: Iterable[tuple[str, Mapping[str, Spooled]]]) -> dict[str, str]:
        whys = {client_id: self._failure(mix) for client_id, mix in tries}
        return {client_id: why for client_id, why in whys.items() if why is not None}

    def _failure(self, mix: Mapping[str, Spooled]) -> str | None:
        """Why the method fails with this mix, if it does."""
        self.uploads.states.drop("server")
        try:
            self.outcome(mix)
        except _NO_UPLOADS_FAULT:
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
            for part in value.values():
                yield from _tensors(part)
        case _ if is_dataclass(value):
            yield from _tensors(vars(value))
