"""Reading files of JSON objects one by one, telling the line of everything that is broken."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedalt.data.encodings import BOM, narrow_encoding
from fedalt.data.formats import LOOK, other_format
from fedalt.data.records import Problems


class Item(NamedTuple):
    """A decoded JSON value, its line (from 1), and the byte where that line starts."""

    line: int
    start: int
    value: object


def read_items(file: Path, place: str, problems: Problems) -> Iterator[Item]:
    """Every value of a file of JSON lines, or of a file that holds one JSON list.

    Blank lines, a byte order mark and Windows line ends are tolerated. What cannot be decoded is
    noted as a problem of `place` and left out; a file of another format or encoding is one problem.
    JSON lines are streamed; a list is read as a whole.
    """
    encodings: set[str] = set()
    try:
        with file.open("rb") as stream:
            begin = stream.read(LOOK)
            if (other := other_format(file, begin)) is not None:
                problems.add(place, other)
                return
            if holds_list(begin):
                yield from _list_items(file.read_bytes(), place, problems)
                return
            stream.seek(0)
            start = 0
            for line, raw in enumerate(stream, 1):
                text = raw.removeprefix(BOM) if line == 1 else raw
                if not text.isspace() and text:
                    try:
                        yield Item(line, start, decode(text))
                    except UnicodeDecodeError as error:
                        looks = narrow_encoding(raw)
                        if looks not in encodings:  # said once: all further lines have it too
                            problems.add(f"{place}:{line}", f"{_not_utf8(error)}; {looks}")
                        encodings.add(looks)
                    except ValueError as error:
                        problems.add(f"{place}:{line}", str(error))
                start += len(raw)
    except OSError as error:
        problems.add(place, f"cannot be read ({error.strerror})")


def read_at(file: Path, starts: Iterator[int]) -> Iterator[object]:
    """The values of the lines that start at the given bytes."""
    with file.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            yield decode(stream.readline().removeprefix(BOM))


def holds_list(begin: bytes) -> bool:
    """Whether a file that begins like this holds one JSON list and not JSON lines."""
    return begin.removeprefix(BOM).lstrip()[:1] == b"["


def decode(raw: bytes) -> object:
    """The JSON value in UTF-8 bytes; a ValueError says what is wrong with them."""
    try:
        return json.loads(raw.decode().rstrip())
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at").removesuffix(" starting")
        raise ValueError(f"not valid JSON: {what} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.start + 1} of the line is not UTF-8"


def _list_items(raw: bytes, place: str, problems: Problems) -> Iterator[Item]:
    """The values of one JSON list, each with the line on which it starts."""
    try:
        text = raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(f"{place}:{line}", f"not UTF-8; {narrow_encoding(raw)}")
        return
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            line += text.count("\n", counted, error.pos)
            problems.add(f"{place}:{line}", f"not valid JSON: {error.msg}")
            return
        except (ValueError, RecursionError):
            problems.add(f"{place}:{line}", "not usable JSON: a number or a nesting too large")
            return
        yield Item(line, 0, value)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            problems.add(f"{place}:{line}", "not valid JSON: expected ',' or ']' behind a record")
            return
    if text[position + 1 :].strip():
        problems.add(f"{place}:{line}", "not valid JSON: text behind the end of the list")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
