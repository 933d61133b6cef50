"""Tables, row by row: CSV and its kin; Parquet and saved datasets by the datasets library."""

import csv
import glob
import io
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from fedalt.core.files import cache_folder, make_private_folder
from fedalt.core.foreign import shown
from fedalt.core.reading import require_no_pipe
from fedalt.data.encodings import narrow_encoding

PARQUET: Final = "Parquet"
SAVED: Final = "a saved dataset"
UNREADABLE: Final = (OSError, EOFError, zlib.error)  # what reading of `opened` files raises
SAVED_AS: Final = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


class TableError(ValueError):
    """A table that cannot be read, and why."""


@dataclass(frozen=True)
class Table:
    """What a file is called, and for a text what stands between its cells."""

    name: str
    delimiter: str = ""


_GZIP: Final = b"\x1f\x8b"  # what such an archive begins with
_LONGEST_CELL: Final = 2**31 - 1  # characters: as many as there may be
_CONVERSATION: Final = ("messages", "tools", "functions")  # fields that hold objects
# Every row with its number, as a spreadsheet counts.
Rows = Sequence[tuple[int, Mapping[str, Any]]]


def rows(file: Path, table: Table) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every row as a record, with its number as a spreadsheet counts. Raises TableError.

    A text's cells are texts, whatever they look like; its empty rows are left out.
    """
    about = file.stat()
    yield from _rows(file, table, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=1)  # a table of several clients is read once for each of them
def _rows(file: Path, table: Table, changed: int, size: int) -> Rows:  # noqa: ARG001
    try:
        if table.delimiter:
            return list(_separated(file, table.delimiter))
        return _of_arrow(file, table)
    except TableError:
        raise
    except UnicodeDecodeError as error:
        raise TableError(f"not UTF-8; {narrow_encoding(error.object)}; save it as UTF-8") from error
    except Exception as error:  # whatever a broken file does to what reads it
        reason = shown(str(error.__cause__ or error).strip(), 300)
        raise TableError(f"cannot be read as {table.name}: {reason}") from error


def _separated(file: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows below the one that names the columns; a cell that a row lacks is None."""
    csv.field_size_limit(_LONGEST_CELL)
    heads: list[str] = []
    at = 0
    with opened(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        try:
            for at, row in enumerate(csv.reader(text, delimiter=delimiter, strict=True), 1):
                if not any(cell and not cell.isspace() for cell in row):
                    continue
                if heads and len(row) > len(heads):
                    raise TableError(
                        f"row {at} has {len(row)} cells, but the first has {len(heads)} names"
                    )
                if heads:
                    yield at, dict(zip_longest(heads, row))
                elif told_delimiter(delimiter.join(row)) is None:
                    heads = _heads(row)
        except csv.Error as error:
            if "expected after" not in str(error):
                raise
            raise TableError(
                f"row {at + 1}: a quotation mark begins a cell, and text follows the one that ends "
                "it; where they are part of the text, write each of them twice and the whole cell "
                "between two more"
            ) from error


def _heads(row: Sequence[str]) -> list[str]:
    """The names of the columns. Raises TableError unless each of them is there once.

    A column without a name, such as the numbers of rows that pandas writes, is called as pandas
    calls it.
    """
    heads = list(row)
    twice = sorted({head for head in heads if head and heads.count(head) > 1})
    if twice:
        raise TableError(f"several columns are called {', '.join(map(repr, twice))}")
    for column, head in enumerate(heads):
        if not head:
            heads[column] = _unnamed(column, heads)
    return heads


def _of_arrow(file: Path, table: Table) -> Rows:
    """The rows of a Parquet file or a saved dataset."""
    if find_spec("datasets") is None:
        raise TableError(f"reading {table.name} needs a package: `pip install 'fedalt[data]'`")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says becomes an error here
    if table.name == SAVED:
        return _objects(datasets.load_from_disk(str(file)))
    # Streamed, the library leaves no copy of the data in its cache. The size of a batch would be
    # that of the first group of rows, which may be empty.
    place: dict[str, Any] = {"data_files": [glob.escape(str(file))], "split": "train"}
    return _objects(datasets.load_dataset("parquet", streaming=True, batch_size=1000, **place))


def _objects(found: Iterable[Mapping[str, Any]]) -> Rows:
    """Rows of Arrow, without what it has added to the objects of a conversation.

    It gives every object of a column the keys of all of them, and null where one has none.
    """
    return [
        (at, {name: _given(cell) if name in _CONVERSATION else cell for name, cell in row.items()})
        for at, row in enumerate(found, 1)
    ]


def _given(value: Any) -> Any:
    if isinstance(value, list):
        return [_given(item) for item in value]
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return value


def downloaded(name: str) -> Path:
    """The folder of a dataset of the Hugging Face hub, fetched once into the cache. TableError."""
    folder = cache_folder() / "datasets" / name.replace("/", "--")
    if folder.is_dir():
        return folder
    if find_spec("datasets") is None:
        raise TableError("a dataset of the hub needs a package: `pip install 'fedalt[data]'`")
    import datasets

    try:
        dataset = datasets.load_dataset(name)
    except Exception as error:  # whatever a network and somebody else's data do to the library
        reason = shown(str(error).strip(), 300)
        raise TableError(f"the hub's dataset {name!r} cannot be had: {reason}") from error
    make_private_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        dataset.save_to_disk(f"{unfinished}/whole")
        (Path(unfinished) / "whole").rename(folder)
    return folder


def told_delimiter(line: str) -> str | None:
    """What a first line such as `sep=;` tells Excel; None where it is another line."""
    return line[4:] if line.startswith("sep=") and len(line) == 5 else None


def _unnamed(at: int, heads: Sequence[str]) -> str:
    """A name that no other column has."""
    name, more = f"Unnamed: {at}", 0
    while name in heads:
        more += 1
        name = f"Unnamed: {at}.{more}"
    return name


def opened(file: Path) -> Any:
    """A file's bytes, unpacked where it is a gzip archive. Raises OSError."""
    import gzip

    require_no_pipe(file)
    stream = file.open("rb")
    packed = stream.read(2) == _GZIP
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream, mode="rb") if packed else stream
