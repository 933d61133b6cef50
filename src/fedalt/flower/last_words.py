"""What a process said last: quoted, and written down by the app, whose output Flower drops."""

import contextlib
import faulthandler
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, TextIO

_TAIL: Final = 2**14  # bytes of a log's end in which its last line is looked for
_QUOTED: Final = 300  # characters of it
_ERROR: Final = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b|Fatal Python error")


@contextmanager
def last_words(log: Path) -> Iterator[None]:
    """Write down whatever ends this process within the context, for its own user to read alone."""
    with _private(log) as file:
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


@contextmanager
def _private(log: Path) -> Iterator[TextIO | None]:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", 1)
    except OSError:
        yield None
        return
    with file:
        yield file


def note(log: Path, text: str) -> None:
    """Write down what somebody else has heard of a process."""
    with _private(log) as file:
        if file is not None:
            file.write(_dated(text))


def _dated(text: str) -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}\n{text}\n"


def length(log: Path) -> int:
    """How long a log is, in bytes; 0 where there is none."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def told_in(log: Path, since: int = 0) -> str:
    """Where to look, and what a log has gained since it was so long: an error's line, or the last.

    Control characters are left out: they may be a stranger's, and a terminal would obey them.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(since, length(log) - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    lines = ["".join(c if c.isprintable() else " " for c in each) for each in text.splitlines()]
    told = [each.strip() for each in lines if each.strip()]
    errors = [each for each in told if _ERROR.match(each)]
    if line := next(iter([*errors[-1:], *told[-1:]]), ""):
        return f"see {log}: {line[:_QUOTED]}"
    return f"see {log}, where it has said nothing"
