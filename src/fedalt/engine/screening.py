"""How a server takes a round's uploads in: checked, some refused, streamed into the aggregate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from fedalt.core.codec import encode, read
from fedalt.core.files import open_private
from fedalt.engine.dry_run import Form
from fedalt.engine.firewall import (
    Firewall,
    Refused,
    Size,
    check_size,
    check_upload,
    size_of,
    too_large,
)
from fedalt.engine.robust import Robust, centre
from fedalt.methods.contract import AnyMethod, Message

Decide = Callable[[str | None], None]


@dataclass(frozen=True)
class Gate:
    """The rules of a round; `robust` takes the place of the method's mean, `trim` is its share."""

    firewall: Firewall = field(default_factory=Firewall)
    robust: Robust | None = None
    trim: float = 0.1

    @property
    def waits(self) -> bool:
        """Whether no upload can be judged or counted before all are there."""
        return self.firewall.norm_limit is not None or self.robust is not None


USUAL: Final = Gate()


@dataclass(frozen=True)
class Arrival:
    """A client's upload at the gate.

    `data` are its bytes as they came, which are measured and, if it is refused, kept; `forms` what
    it must look like, None where that was checked before. `decide` is told the verdict, once: None
    if the upload counts, else the reason why it does not.
    """

    client_id: str
    upload: Message
    data: bytes
    forms: Sequence[Form] | None
    decide: Decide


class Yard(Protocol):
    """Where uploads wait, and where those go that are refused; a store backs it with files."""

    def begin(self) -> None:
        """Forget what an attempt at this round that was cut short has left."""
        ...

    def waiting(self) -> AbstractContextManager[Path]:
        """An empty folder, which is gone again afterwards."""
        ...

    def quarantine(self, client_id: str, reason: str, data: bytes, limit: int) -> None:
        """Note a refused upload; keep its bytes unless more than `limit` would be kept in all."""
        ...


@dataclass(frozen=True)
class _Waiting:
    """An upload in a file, and how large it is."""

    client_id: str
    file: Path
    size: Size
    decide: Decide


def take_in(
    method: AnyMethod, server: Any, arrivals: Iterable[Arrival], gate: Gate, yard: Yard
) -> Any | None:
    """The server's state after the uploads that count; None if none does: nothing has happened.

    Arrivals come sorted by client and are asked for one at a time. Where all have to be there
    before one can be judged, they wait in files: memory does not grow with their number.
    """
    counted = 0

    def replies(uploads: Iterable[tuple[str, Message]]) -> Iterator[tuple[str, Message]]:
        nonlocal counted
        for reply in uploads:
            counted += 1
            yield reply

    yard.begin()
    checked = _checked(arrivals, gate.firewall, yard)
    if not gate.waits:
        after = method.aggregate(server, replies(_at_once(checked)))
        return after if counted else None
    with yard.waiting() as folder:
        after = method.aggregate(server, replies(_together(checked, gate, yard, folder)))
    return after if counted else None


def _checked(arrivals: Iterable[Arrival], firewall: Firewall, yard: Yard) -> Iterator[Arrival]:
    """Those of the right size and form; of the others the reason is told."""
    for arrival in arrivals:
        try:
            check_size(len(arrival.data), firewall.max_upload_bytes)
            if arrival.forms is not None:
                check_upload(arrival.upload, arrival.forms)
        except Refused as error:
            limit = firewall.quarantine_bytes
            yard.quarantine(arrival.client_id, str(error), arrival.data, limit)
            arrival.decide(str(error))
            continue
        yield arrival


def _at_once(arrivals: Iterable[Arrival]) -> Iterator[tuple[str, Message]]:
    for arrival in arrivals:
        arrival.decide(None)
        yield arrival.client_id, arrival.upload


def _together(
    arrivals: Iterable[Arrival], gate: Gate, yard: Yard, folder: Path
) -> Iterator[tuple[str, Message]]:
    """Those that are not too large beside the others, each with the centre if that is asked for."""
    everyone = [
        _wait(arrival, folder / f"{number:06d}.safetensors")
        for number, arrival in enumerate(arrivals)
    ]
    limit = gate.firewall.norm_limit
    sizes = {each.client_id: each.size for each in everyone}
    refused = {} if limit is None else too_large(sizes, limit)
    files = [
        each.file
        for each in everyone
        if each.client_id not in refused and each.size.norm is not None
    ]
    middle = centre(files, gate.robust, gate.trim) if gate.robust and files else {}
    for each in everyone:
        reason = refused.get(each.client_id)
        if reason is not None:
            kept = gate.firewall.quarantine_bytes
            yard.quarantine(each.client_id, reason, each.file.read_bytes(), kept)
        each.decide(reason)
        if reason is None:
            upload = read(Message, each.file)
            yield each.client_id, replace(upload, tree=middle) if middle and upload.tree else upload


def _wait(arrival: Arrival, file: Path) -> _Waiting:
    with open_private(file, "wb") as opened:
        opened.write(encode(arrival.upload))
    return _Waiting(arrival.client_id, file, size_of(arrival.upload), arrival.decide)
