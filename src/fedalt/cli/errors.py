"""What a user sees of an error: one sentence, and whose mistake it was."""

import sys
import tempfile
import traceback
from pathlib import Path

from fedalt.core.foreign import shown_message
from fedalt.core.reading import PassingError

PACKAGE = Path(__file__).parents[1]
LONGEST_ERROR = 12_000  # characters: all problems of a folder of data are one error


def report(error: Exception) -> int:
    """Say what went wrong on stderr; 2 for a mistake of the user's, 1 for one of ours.

    75 where trying again later may do, as service managers have it (EX_TEMPFAIL).
    """
    if isinstance(error, PassingError):
        _say(f"error: {error}")
        return 75
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror}")
        return 2
    if isinstance(error, ValueError) and _raised_here(error):
        _say(f"error: {error}")
        return 2
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="fedalt-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.write(text)
    what = str(error).strip().splitlines()
    _say(
        f"error: this is a fault in fedalt: {type(error).__name__}: {what[0] if what else ''}\n"
        f"  please report it with {file.name}; `--debug` shows its content"
    )
    return 1


def _raised_here(error: BaseException) -> bool:
    """Whether our own code found the mistake; a library's ValueError is one that we let happen."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def _say(text: str) -> None:
    """Errors quote what they are about, which may be anybody's."""
    print(shown_message(text, LONGEST_ERROR), file=sys.stderr)
