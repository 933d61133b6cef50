"""Writing a file so that a crash or a full disk leaves it whole, and many of them in passing.

Whatever is written here is for its owner alone, as keys are: files 0600 in folders of 0700, since
adapters, texts and logs tell of client data.
"""

import contextlib
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Protocol

from filelock import FileLock

_AT_A_TIME: Final = 4  # writes; a disk takes several at once in about the time of one
_BEHIND: Final = 32  # writes that wait or are being done: what they hold is in memory
_UNFINISHED: Final = re.compile(r"\.[0-9a-f]{16}\.tmp")


class Writer(Protocol):
    """Who carries out writes: whoever asks for one, or somebody else while that goes on."""

    def write(self, act: Callable[[], None]) -> None:
        """Have it done by the next `finish`; an error may come from here, too.

        In any order: until then nobody asks for another write to the same file.
        """

    def finish(self) -> None:
        """Wait until all is done that was asked for. Raises the error of what was not."""


@dataclass(frozen=True)
class AtOnce:
    """Whoever asks does it."""

    def write(self, act: Callable[[], None]) -> None:
        """See `Writer`."""
        act()

    def finish(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class _Behind:
    """Threads do it, so that nobody waits for the disk but who is too far ahead of it."""

    threads: ThreadPoolExecutor
    asked: deque[Future[None]] = field(default_factory=deque)

    def write(self, act: Callable[[], None]) -> None:
        while len(self.asked) >= _BEHIND:
            self.asked.popleft().result()
        self.asked.append(self.threads.submit(act))

    def finish(self) -> None:
        while self.asked:
            self.asked.popleft().result()


@contextlib.contextmanager
def writing_behind() -> Iterator[Writer]:
    """A writer whose writes are done by threads; what is not finished may be left out.

    No thread writes on after the block, however it ends.
    """
    with ThreadPoolExecutor(_AT_A_TIME, "writing") as threads:
        try:
            yield _Behind(threads)
        finally:
            threads.shutdown(cancel_futures=True)


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner can look into, and those above it that are not there.

    One that is there already stays as it is.
    """
    if folder.is_dir():
        return
    make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: Path, mode: str) -> IO[Any]:
    """Open a file for writing; a new one is for its owner alone. Texts are UTF-8."""
    encoding = None if "b" in mode else "utf-8"
    return open(path, mode, encoding=encoding, opener=_open_private)


def write_private(path: Path, text: str) -> None:
    """Write a text into a file for its owner alone; a crash may leave a part of it."""
    with open_private(path, "w") as file:
        file.write(text)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file by one with this content, so that a crash leaves the old or the new one.

    The new content waits beside it in a file `.XXXX.tmp`, which only a kill can leave behind.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open_private(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk's own error names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def is_unfinished(file: Path) -> bool:
    """Whether a killed `atomic_write` has left this file."""
    return _UNFINISHED.fullmatch(file.name) is not None and file.is_file()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until nobody else is within this block with this lock file; a dead process holds none.

    The file stays, as whoever waits has it open.
    """
    # A soft lock, in place of one that a file system does not know, would outlive its process.
    with FileLock(lock, mode=0o600, thread_local=False, fallback_to_soft=False):
        yield


def cache_folder() -> Path:
    """Where what was fetched or converted once lies: XDG_CACHE_HOME, or a user's usual cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedalt"
