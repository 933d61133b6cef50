"""What ended a process: written down by the app, whose output Flower drops, and quoted."""

import contextlib
import faulthandler
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, TextIO

_TAIL: Final = 2**14  # bytes at a log's end in which its last line is looked for
_QUOTED: Final = 300  # characters of that line
_FULL: Final = 2**16  # bytes; on a disk with less nothing of ours can be kept
_ERROR: Final = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b|Fatal Python error")


@contextmanager
def recording_crashes(log: Path) -> Iterator[None]:
    """Write whatever ends this process within the context to a file for its own user alone."""
    with _opened(log) as file:
        if file is None:  # the disk is full: it ends as it would have
            yield
            return
        faulthandler.enable(file)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                file.write(_dated(traceback.format_exc()))
            raise
        finally:
            faulthandler.disable()


def append(log: Path, text: str) -> None:
    """Write down what somebody else reports of a process."""
    with _opened(log) as file:
        if file is not None:
            file.write(_dated(text))


def length(log: Path) -> int:
    """How long a log is, in bytes; 0 where there is none."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def last_line(log: Path, since: int = 0) -> str:
    """Where to look, and the last error (or line) that a log has gained since it was so long.

    Control characters are left out: they may be a stranger's, and a terminal would obey them.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(since, length(log) - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    printable = "".join(c if c.isprintable() or c in "\r\n" else " " for c in text)
    lines = [line.strip() for line in printable.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    if not lines:
        return f"see {log}, where it left no message{_of_a_full_disk(log)}"
    return f"see {log}: {(errors or lines)[-1][:_QUOTED]}"


def _of_a_full_disk(log: Path) -> str:
    """That nothing can be written there, which nothing can be written of."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(log.parent).free < _FULL:
            return ": its disk is full"
    return ""


@contextmanager
def _opened(log: Path) -> Iterator[TextIO | None]:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", 1)
    except OSError:
        yield None
        return
    with file:
        yield file


def _dated(text: str) -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}\n{text}\n"
