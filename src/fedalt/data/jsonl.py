"""Reading files of records one by one, telling the line of everything that is broken."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fedalt.data.encodings import BOM, narrow_encoding
from fedalt.data.formats import LOOK, other_format, table_of
from fedalt.data.json_text import DECODER, RepeatedKeyError, parsed
from fedalt.data.records import Problems
from fedalt.data.tables import UNREADABLE, Table, TableError, opened, rows


class Item(NamedTuple):
    """A record's value, its line or row (from 1), and where it starts.

    That is a byte of a file of JSON lines, and else how many records come before.
    """

    line: int
    start: int
    value: object


def read_items(file: Path, place: str, problems: Problems) -> Iterator[Item]:
    """Every value of a file of JSON lines, of one that holds one JSON list, or of a table.

    Blank lines, a byte order mark and Windows line ends are tolerated. What cannot be decoded is
    noted as a problem of `place` and left out; a file of another format or encoding is one problem.
    JSON lines are streamed, also out of a gzip archive; anything else is read as a whole.
    """
    try:
        begin = beginning(file)
        if (other := other_format(file, begin)) is not None:
            problems.add(place, other)
        elif (table := table_of(file, begin)) is not None:
            yield from _rows(file, table, place, problems)
        elif holds_list(begin):
            with opened(file) as stream:
                raw = stream.read()
            yield from _list_items(raw, place, problems)
        else:
            yield from _lines(file, place, problems)
    except UNREADABLE as error:  # a broken archive has no errno
        problems.add(place, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def _lines(file: Path, place: str, problems: Problems) -> Iterator[Item]:
    encodings: set[str] = set()
    start = 0
    with opened(file) as stream:
        for line, raw in enumerate(stream, 1):
            text = raw.removeprefix(BOM) if line == 1 else raw
            if not text.isspace() and text:
                try:
                    yield Item(line, start, decode(text))
                except UnicodeDecodeError as error:
                    looks = narrow_encoding(raw)
                    if looks not in encodings:  # said once: all further lines have it too
                        where = f"byte {error.start + 1} of the line is not UTF-8"
                        problems.add(f"{place}:{line}", f"{where}; {looks}")
                    encodings.add(looks)
                except ValueError as error:
                    problems.add(f"{place}:{line}", str(error))
            start += len(raw)


def _rows(file: Path, table: Table, place: str, problems: Problems) -> Iterator[Item]:
    try:
        for before, (number, row) in enumerate(rows(file, table)):
            yield Item(number, before, row)
    except TableError as error:
        problems.add(place, str(error))


def read_at(file: Path, starts: Sequence[int]) -> Iterator[object]:
    """The values that start there, in this order."""
    begin = beginning(file)
    if table_of(file, begin) is not None or holds_list(begin):
        values = [item.value for item in read_items(file, file.name, Problems(file))]
        yield from (values[start] for start in starts)
        return
    with opened(file) as stream:
        for start in starts:
            stream.seek(start)
            yield decode(stream.readline().removeprefix(BOM))


def beginning(file: Path) -> bytes:
    """What a file begins with, unpacked; nothing of a folder."""
    if file.is_dir():
        return b""
    with opened(file) as stream:
        begin: bytes = stream.read(LOOK)
        return begin


def holds_list(begin: bytes) -> bool:
    """Whether a file that begins like this holds one JSON list and not JSON lines."""
    return begin.removeprefix(BOM).lstrip()[:1] == b"["


def decode(raw: bytes) -> object:
    """The JSON value in UTF-8 bytes; a ValueError says what is wrong with them."""
    try:
        return parsed(raw.decode().rstrip())
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at").removesuffix(" starting")
        raise ValueError(f"not valid JSON: {what} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    except (UnicodeDecodeError, RepeatedKeyError):
        raise
    except ValueError:
        raise ValueError("not usable JSON: a number of too many digits") from None


def _list_items(raw: bytes, place: str, problems: Problems) -> Iterator[Item]:
    """The values of one JSON list, each with the line on which it starts."""
    try:
        text = raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(f"{place}:{line}", f"not UTF-8; {narrow_encoding(raw)}")
        return
    position, line, counted, before = text.index("[") + 1, 1, 0, 0
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            line += text.count("\n", counted, error.pos)
            problems.add(f"{place}:{line}", f"not valid JSON: {error.msg}")
            return
        except RepeatedKeyError as error:
            problems.add(f"{place}:{line}", str(error))
            return
        except (ValueError, RecursionError):
            problems.add(f"{place}:{line}", "not usable JSON: a number or a nesting too large")
            return
        yield Item(line, before, value)
        before += 1
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
