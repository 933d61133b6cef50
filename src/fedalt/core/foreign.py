"""Text that others chose, on its way to a terminal, a log, a page or a status: cleaned and cut.

Names, labels, records, answers and errors about them come from files, servers and clients that
somebody else wrote. A terminal obeys control characters, a log is read line by line, and a page
turns its text round where it is told to, so no such text is shown as it came.
"""

from collections.abc import Iterable
from typing import Final

LONGEST: Final = 500  # characters of a sentence that quotes others
LONGEST_TEXT: Final = 20_000  # characters of a text of several lines

# These take no room, or none that can be seen, and Python calls them printable.
_INVISIBLE: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_JOINERS: Final = frozenset("\u200c\u200d")  # which Persian, Hindi and many emoji are spelt with


def shown(text: object, most: int = LONGEST) -> str:
    """One line that can be shown anywhere; at most `most` characters of it, then `...`.

    Whatever is not printable stands there as its escape, such as `\\x1b` or `\\n`: control and
    direction characters, line ends, what takes no room, surrogates.
    """
    whole = str(text)
    clean = "".join(_escaped(letter) for letter in whole[: most + 1])
    return clean if len(whole) <= most and len(clean) <= most else f"{clean[:most]}..."


def shown_lines(text: object, most: int = LONGEST_TEXT) -> str:
    """The same for a text of several lines: line ends, tabs and the joiners of scripts stay."""
    whole = str(text).replace("\r\n", "\n")
    clean = "".join(
        letter if letter in "\n\t" or letter in _JOINERS else _escaped(letter)
        for letter in whole[: most + 1]
    )
    return clean if len(whole) <= most else f"{clean[:most]}..."


def shown_message(text: object, most: int = LONGEST_TEXT) -> str:
    """The same for a message: its later lines are set in, so that none can pass for another one."""
    first, *others = shown_lines(text, most).split("\n")
    return "\n".join([first, *(f"  {line.strip()}" for line in others)])


def listed(names: Iterable[object], most: int = 5) -> str:
    """Names in one line, separated by commas; of more than `most`, how many more there are."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(shown(name, 120) for name in known[:most]) + more


def _escaped(letter: str) -> str:
    if letter.isprintable() and letter not in _INVISIBLE:
        return letter
    return letter.encode("unicode_escape").decode("ascii")
