"""A round's uploads: on disk until they are aggregated, so that memory does not grow with them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import ClassVar

from fedalt.core.codec import encode, read
from fedalt.core.files import open_private
from fedalt.engine.changes import Sent
from fedalt.engine.firewall import WEIGHT, Screening, Size, size_of
from fedalt.engine.privacy import Release
from fedalt.engine.robust import centre
from fedalt.engine.states import States
from fedalt.methods.contract import Message

Metrics = Mapping[str, int | float]


@dataclass(frozen=True)
class Upload:
    """What comes of a client's training: its message, its part of its group's seconds, metrics.

    `download_bytes` is the size of what it was sent, None where that is the method's broadcast
    alone; `source` is the file of the answer that it came in, if there is one. A late one may count
    less: `counts` is a factor of its weight.
    """

    TAG: ClassVar = "upload"

    client_id: str
    message: Sent
    seconds: float
    metrics: Metrics = field(default_factory=dict)
    download_bytes: int | None = None
    source: str = ""
    counts: float = 1.0


@dataclass(frozen=True)
class Spooled:
    """An upload in a file of its own, and in which file it came if not in that one."""

    file: Path
    size: Size
    source: Path


@dataclass(frozen=True)
class UploadStore:
    """The uploads of a round in an empty `folder`, accepted unless they are rejected.

    They are spooled, and come back, sorted by client. `release` has the noise of their sum.
    """

    folder: Path
    states: States
    screening: Screening
    release: Release | None = None
    accepted: dict[str, Spooled] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    def spool(self, upload: Upload, message: Message, data: bytes) -> None:
        """Write an upload, which was sent as `data` and read as a message, into a file."""
        if upload.counts != 1 and WEIGHT in message.facts:
            weight = float(message.facts[WEIGHT]) * upload.counts
            message = replace(message, facts={**message.facts, WEIGHT: weight})
        spooled = self.write(message, data if message is upload.message else b"")
        source = Path(upload.source) if upload.source else spooled.file
        self.accepted[upload.client_id] = replace(spooled, source=source)

    def reject(self, client_id: str, reason: str, data: bytes | None = None) -> None:
        """Quarantine an upload; its client's state stays the one before the round."""
        if data is None:
            data = self.accepted.pop(client_id).source.read_bytes()
        limit = self.screening.firewall.quarantine_bytes
        self.states.quarantine(client_id, reason, data, limit)
        self.states.drop(f"clients/{client_id}")
        self.states.drop(f"moments/{client_id}")
        self.rejected[client_id] = reason

    def replies(self, mix: Mapping[str, Spooled]) -> Iterator[tuple[str, Message]]:
        """Some of the uploads as the method gets them."""
        plain = self._without_noise(mix)
        return plain if self.release is None else self.release.noised(mix, plain)

    def _without_noise(self, mix: Mapping[str, Spooled]) -> Iterator[tuple[str, Message]]:
        """One at a time, each tree exchanged for the robust centre if that is asked for."""
        files = [spooled.file for spooled in mix.values() if spooled.size.norm is not None]
        robust, trim = self.screening.robust, self.screening.trim
        middle = centre(files, robust, trim) if robust and files else {}
        for client_id, spooled in mix.items():
            message = read(Message, spooled.file)
            has_centre = bool(middle and message.tree)
            yield client_id, replace(message, tree=middle) if has_centre else message

    def write(self, message: Message, data: bytes = b"") -> Spooled:
        """Write a message, which is `data` as bytes if these are there, into a file of its own."""
        file = self.folder / f"{next(self._numbers):06d}.safetensors"
        with open_private(file, "wb") as opened:
            opened.write(data or encode(message))
        return Spooled(file, size_of(message), file)
