"""Bodies of requests and answers on disk while they come in: memory does not grow with them."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Final

_IN_MEMORY: Final = 2**16  # bytes; most are smaller
_PART: Final = 2**18  # bytes that are read at a time

Body = SpooledTemporaryFile[bytes]


class NoRoomError(Exception):
    """There is no room for more of somebody's bodies, now."""


@dataclass
class BodyStore:
    """Where bodies lie, and how many bytes of them there may be: of one key, and in all.

    None as a folder is the system's for temporary files.
    """

    folder: Path | None
    per_key: int
    in_all: int
    held: Counter[bytes] = field(default_factory=Counter)

    @contextmanager
    def body(self, key: bytes) -> Iterator["IncomingBody"]:
        """A body that counts as this key's until the end of the context."""
        with self.new_body() as file:
            incoming = IncomingBody(self, key, file)
            try:
                yield incoming
            finally:
                self.held[key] -= incoming.size
                if self.held[key] <= 0:
                    del self.held[key]

    def new_body(self) -> Body:
        """An empty one; nothing of it is left when it is closed, or its process killed."""
        folder = None if self.folder is None else str(self.folder)
        return SpooledTemporaryFile(max_size=_IN_MEMORY, dir=folder)


@dataclass
class IncomingBody:
    """A body that comes in."""

    store: BodyStore
    key: bytes
    file: Body
    size: int = 0

    async def receive(self, stream: AsyncIterator[bytes], most: int) -> None:
        """Put a request's body on disk. Of one with more than `most` bytes as many are dropped.

        Who sends it hears of that only when it is done sending. Raises NoRoomError.
        """
        over = 0
        async for part in stream:
            if self.size <= most:
                self._add(part)
            else:
                over += len(part)
            if over > most:
                return

    def _add(self, part: bytes) -> None:
        store, held = self.store, self.store.held
        if held[self.key] + len(part) > store.per_key or held.total() + len(part) > store.in_all:
            raise NoRoomError
        held[self.key] += len(part)
        self.size += len(part)
        try:
            self.file.write(part)
        except OSError as error:  # the disk is full
            raise NoRoomError from error


async def parts(file: Body) -> AsyncIterator[bytes]:
    """All of a body, in parts."""
    file.seek(0)
    while part := file.read(_PART):
        yield part
