"""What a client may be called, wherever its name comes in: it names files, folders and keys."""

import re
from collections.abc import Iterable

from fedalt.core.foreign import shown

LONGEST_NAME = 100

_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def is_safe(name: str) -> bool:
    """Whether a client's name can name a folder on every file system."""
    return _SAFE.fullmatch(name) is not None and not name.endswith(".")


def fault_of_names(names: Iterable[str]) -> str:
    """What is wrong with clients' names, in one clause; "" where nothing is."""
    spelling: dict[str, str] = {}
    for name in names:
        if not is_safe(name):
            return (
                f"client {shown(repr(name), 120)}: expected a name of at most 100 letters (A-Z), "
                "digits, '.', '_' and '-', without a '.' at either end, as it names a folder"
            )
        other = spelling.setdefault(name.casefold(), name)
        if other != name:
            return (
                f"client {name!r} differs from {other!r} in case only, and some file systems take "
                "both for one"
            )
    return ""


def fault_of_title(title: str) -> str:
    """What is wrong with a federation's name, in one clause; "" where nothing is."""
    if 0 < len(title) <= LONGEST_NAME and shown(title) == title and title.strip() == title:
        return ""
    return (
        f"name {shown(repr(title), 120)}: expected 1 to {LONGEST_NAME} printable characters, "
        "without blanks at either end"
    )
