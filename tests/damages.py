"""What can happen to the files of a folder: each kind damages one of them, or two, by a seed."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True)
class Target:
    """A file of a folder, and where it would lie in the older one."""

    file: Path
    place: Path
    before: Path


def files_of(place: Path) -> list[Path]:
    """The files that are damaged: states and what speaks of them, no client data and no keys."""
    return sorted(
        path
        for path in place.rglob("*")
        if path.is_file()
        and path.suffix not in (".pub", ".key", ".crt", ".md")
        and not {"data", "authority", "logs"} & set(path.relative_to(place).parts)
        and path.name != ".lock"
    )


@contextmanager
def damaged(file: Path, spoil: "Kind") -> Iterator[None]:
    """A file that is damaged within the context, and afterwards as it was."""
    whole = file.read_bytes()
    assert spoil(Target(file, file.parent, file), random.Random(0)) == [file]
    yield
    file.write_bytes(whole)


def delete(at: Target, draw: random.Random) -> list[Path]:
    file = at.file
    file.unlink()
    return [file]


def truncate(at: Target, draw: random.Random) -> list[Path] | None:
    file = at.file
    if file.stat().st_size < 2:
        return None
    os.truncate(file, draw.randrange(1, file.stat().st_size))
    return [file]


def empty(at: Target, draw: random.Random) -> list[Path] | None:
    file = at.file
    if not file.stat().st_size:
        return None
    os.truncate(file, 0)
    return [file]


def half_line(at: Target, draw: random.Random) -> list[Path] | None:
    """A file of lines, of which one has lost its second half."""
    lines = at.file.read_bytes().splitlines(keepends=True)
    if at.file.suffix != ".jsonl" or not lines:
        return None
    number = draw.randrange(len(lines))
    lines[number] = lines[number][: len(lines[number]) // 2]
    at.file.write_bytes(b"".join(lines))
    return [at.file]


def flip(at: Target, draw: random.Random) -> list[Path] | None:
    file = at.file
    data = bytearray(file.read_bytes())
    if not data:
        return None
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return [file]


def swap(at: Target, draw: random.Random) -> list[Path] | None:
    file = at.file
    others = [
        other
        for other in files_of(at.place)
        if other.suffix == file.suffix and other != file and other.read_bytes() != file.read_bytes()
    ]
    if not others:
        return None
    other = draw.choice(sorted(others))
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)
    return [file, other]


def folder_instead(at: Target, draw: random.Random) -> list[Path]:
    file = at.file
    file.unlink()
    file.mkdir()
    return [file]


def wrong_type(at: Target, draw: random.Random) -> list[Path] | None:
    file = at.file
    return _changed(file, draw, lambda table, key: {**table, key: draw.choice(_VALUES)})


def without_a_key(at: Target, draw: random.Random) -> list[Path] | None:
    file = at.file
    return _changed(
        file, draw, lambda table, key: {each: table[each] for each in table if each != key}
    )


_VALUES: Final = (None, [], {}, "x", -1, 1.5, True, [{"a": None}])


def _changed(
    file: Path, draw: random.Random, change: Callable[[dict[str, Any], str], object]
) -> list[Path] | None:
    """Change what a file of JSON, or a line of one, holds."""
    if file.suffix not in (".json", ".jsonl"):
        return None
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    if not lines:
        return None
    at = draw.randrange(len(lines))
    table = json.loads(lines[at])
    if not isinstance(table, dict) or not table:
        return None
    lines[at] = json.dumps(change(table, draw.choice(sorted(table))))
    file.write_text("".join(f"{line}\n" for line in lines))
    return [file]


def old_copy(at: Target, draw: random.Random) -> list[Path] | None:
    """The file as it was two rounds ago, or the state of an older round in its place."""
    file = at.file
    older = [at.before] if at.before.is_file() else []
    older += [each for each in sorted(file.parent.glob("*.safetensors")) if each.name < file.name]
    older = [each for each in older if each.read_bytes() != file.read_bytes()]
    if not older:
        return None
    shutil.copyfile(draw.choice(older), file)
    return [file]


def unknown(at: Target, draw: random.Random) -> list[Path] | None:
    """A file that nobody has written: of another name, or of a round that is to come."""
    file = at.file
    names = [f"x{file.name}", f"{file.name}.old"]
    if file.suffix == ".safetensors":
        names += ["0000.safetensors", "0003.safetensors", "0004.safetensors", "0099.safetensors"]
    new = file.with_name(draw.choice(names))
    if new.exists():
        return None
    shutil.copyfile(file, new)
    return [new]


def rubbish(at: Target, draw: random.Random) -> list[Path]:
    file = at.file
    file.write_bytes(draw.choice([b"{", b"null", b"\xff\xfe\x00", b"[1, 2]", b"x = 1\n", b'"a"\n']))
    return [file]


def without_rights(at: Target, draw: random.Random) -> list[Path] | None:
    file = at.file
    if os.geteuid() == 0:
        return None  # who may do everything reads it all the same
    file.chmod(0)
    return [file]


Kind = Callable[[Target, random.Random], list[Path] | None]
KINDS: Final[tuple[tuple[str, Kind], ...]] = (
    ("deleted", delete),
    ("truncated", truncate),
    ("emptied", empty),
    ("half a line", half_line),
    ("a bit flipped", flip),
    ("swapped", swap),
    ("a folder instead", folder_instead),
    ("a wrong type", wrong_type),
    ("a key missing", without_a_key),
    ("an old copy", old_copy),
    ("an unknown file", unknown),
    ("rubbish", rubbish),
    ("without rights", without_rights),
)
