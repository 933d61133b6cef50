"""Tables (CSV and its kin, Parquet, a saved dataset), read row by row by the datasets library."""

import csv
import glob
import io
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
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
    if find_spec("datasets") is None:
        raise TableError(f"reading {table.name} needs a package: `pip install 'fedalt[data]'`")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says becomes an error here
    try:
        if table.name == SAVED:
            return _objects(datasets.load_from_disk(str(file)))
        # Streamed, the library leaves no copy of the data in its cache.
        place: dict[str, Any] = {"data_files": [glob.escape(str(file))], "split": "train"}
        if not table.delimiter:
            # The size of a batch would be that of the first group of rows, which may be empty.
            streamed = datasets.load_dataset("parquet", streaming=True, batch_size=1000, **place)
            return _objects(streamed)
        _require_named_as_packed(file)
        above, heads = _heads(file, table.delimiter)
        texts = datasets.Features({name: datasets.Value("string") for name in heads})
        told = {"sep": table.delimiter, "keep_default_na": False, "features": texts}
        # Empty lines count, so that rows have the numbers that a spreadsheet shows.
        told |= {"names": heads, "header": above, "skip_blank_lines": False}
        found = datasets.load_dataset("csv", streaming=True, **told, **place)
        read = [(at, row) for at, row in enumerate(found, above + 2) if _is_filled(row.values())]
        counts = _cells(file, table.delimiter)
        return [(at, _as_long(row, counts.get(at, len(row)))) for at, row in read]
    except TableError:
        raise
    except UnicodeDecodeError as error:
        raise TableError(f"not UTF-8; {narrow_encoding(error.object)}; save it as UTF-8") from error
    except Exception as error:  # whatever a broken file does to the libraries that read it
        reason = shown(str(error.__cause__ or error).strip(), 300)
        raise TableError(f"cannot be read as {table.name}: {reason}") from error


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


def _heads(file: Path, delimiter: str) -> tuple[int, list[str]]:
    """How many rows without cells a table begins with, and the names in the next one.

    Each of them is there once, and they are enough for the row below. A column without a name, such
    as the numbers of rows that pandas writes, is called as pandas calls it.
    """
    with opened(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        filled = (
            (at, row)
            for at, row in enumerate(csv.reader(text, delimiter=delimiter))
            if _is_filled(row) and told_delimiter(delimiter.join(row)) is None
        )
        above, heads = next(filled, (0, []))
        try:
            at, first = next(filled, (0, []))
        except csv.Error:  # a cell that is longer than this reader takes; the library takes it
            at, first = 0, []
    twice = sorted({head for head in heads if head and heads.count(head) > 1})
    if twice:
        raise TableError(f"several columns are called {', '.join(map(repr, twice))}")
    if len(first) > len(heads):  # or the library would take its first cell for a name of the row
        raise TableError(
            f"row {at + 1} has {len(first)} cells, but the first has {len(heads)} names"
        )
    for column, head in enumerate(heads):
        if not head:
            heads[column] = _unnamed(column, heads)
    return above, heads


def _cells(file: Path, delimiter: str) -> dict[int, int]:
    """How many cells each row has, by its number. TableError for a quote that is out of place.

    The library that reads the cells would end one at such a quote, or join it with those below.
    """
    counts: dict[int, int] = {}
    with opened(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        try:
            for at, row in enumerate(csv.reader(text, delimiter=delimiter, strict=True), 1):
                counts[at] = len(row)
        except csv.Error as error:
            if "field limit" not in str(error):  # a cell longer than this reader takes
                raise TableError(
                    f"row {len(counts) + 1}: a quotation mark begins a cell, and text follows the "
                    "one that ends it; where they are part of the text, write each of them twice "
                    "and the whole cell between two more"
                ) from error
    return counts


def _as_long(row: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """A row without what its line does not have: the library takes that for empty texts."""
    return {name: cell if at < count else None for at, (name, cell) in enumerate(row.items())}


def _require_named_as_packed(file: Path) -> None:
    """The library goes by the name. Raises TableError where that says other than the content."""
    with file.open("rb") as stream:
        packed = stream.read(2) == _GZIP
    if packed and file.suffix != ".gz":
        raise TableError("it is packed with gzip, so its name has to end in .gz; rename it")
    if not packed and file.suffix == ".gz":
        raise TableError("its name ends in .gz, but it is not packed with gzip; rename it")


def told_delimiter(line: str) -> str | None:
    """What a first line such as `sep=;` tells Excel; None where it is another line."""
    return line[4:] if line.startswith("sep=") and len(line) == 5 else None


def _is_filled(cells: Iterable[str | None]) -> bool:
    return any(cell and not cell.isspace() for cell in cells)


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
