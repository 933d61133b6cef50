"""Which files of a folder hold whose data: the layouts that client data may have."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedalt.core.foreign import listed, shown
from fedalt.core.settings import HUB
from fedalt.data.examples import Split
from fedalt.data.formats import other_format
from fedalt.data.records import DataError
from fedalt.data.tables import SAVED_AS, TableError, downloaded

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PARTITION_FILE = "split.json"  # written beside client files that were made from one file

_KINDS = r"\.(?:jsonl|json|csv|tsv|parquet)(?:\.gz)?"
_DATA = re.compile(rf"(.+?){_KINDS}")
_NAMED = re.compile(rf"(.+)\.(train|validation|test){_KINDS}")
_REFERENCE = re.compile(r"local_(training|testing)_(\d+)\.jsonl?")
# What people call the three splits, and what such a file may end with.
_MEANT = re.compile(r"(.+)[._-](train|val|test)(?:ing|id|idation)?\.(?:jsonl?|ndjson|txt)", re.I)
_NO_DATA = re.compile(r"(readme|licen[sc]e|notice|changelog|makefile)(\..*)?", re.I)
_WANTED = (
    "NAME.train.jsonl (with NAME.test.jsonl and NAME.validation.jsonl; .csv, .tsv, .parquet and "
    ".gz do as well), local_training_K.json (with local_testing_K.jsonl), "
    "or one file with a column that names the client"
)


@dataclass(frozen=True)
class Source:
    """A file, and whose data it holds; `client_id` None: a column of the file says so."""

    file: Path
    client_id: str | None
    split: Split


@dataclass(frozen=True)
class Layout:
    """The files of client data and, for the user to see, the names of files that are not read."""

    root: Path
    sources: tuple[Source, ...]
    ignored: tuple[str, ...] = ()

    def place(self, file: Path) -> str:
        """A file's name in errors."""
        return file.relative_to(self.root).as_posix()


def find_layout(path: Path) -> Layout:
    """The layout of a folder or file; a DataError tells what would be one.

    The reference layout may keep its two kinds of files in the subfolders `train` and `test`. A
    dataset saved by the datasets library has a client column.
    """
    if str(path).startswith(HUB):
        try:
            return find_layout(downloaded(str(path).removeprefix(HUB)))
        except TableError as error:
            raise DataError(f"{path}: {error}") from error
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a folder with {_WANTED}")
    if path.is_file():
        return _one_file(path)
    visible = _entries(path)
    if any((path / name).is_file() for name in SAVED_AS):
        return _saved(path, visible)
    for entry in visible:
        if entry.is_dir() and _source(entry) is not None:
            raise DataError(f"{entry}: expected a file of records, but it is a folder")
    files = [entry for entry in visible if not entry.is_dir()]
    candidates = list(files)
    for name in ("train", "test"):
        if (path / name).is_dir():
            inside = _entries(path / name)
            candidates += [file for file in inside if _REFERENCE.fullmatch(file.name)]
    sources = [source for file in candidates if (source := _source(file)) is not None]
    if sources:
        return Layout(path, tuple(sources), _unread(path, visible, sources))
    single = [file for file in files if _client_of(file) and file.name != PARTITION_FILE]
    trains = [file for file in single if _client_of(file) == "train"]
    if len(single) == 1 or len(trains) == 1:
        layout = _one_file((single if len(single) == 1 else trains)[0])
        return replace(layout, ignored=_unread(path, visible, layout.sources))
    if single and not trains:
        sources = [Source(file, _client_of(file), "train") for file in single]
        return Layout(path, tuple(sources), _unread(path, visible, sources))
    contents = _seen(path, visible)
    for file in files:
        if not _NO_DATA.fullmatch(file.name) and (other := other_format(file)) is not None:
            contents += f"; {file.name}: {other}"
            break
    raise DataError(f"{path}: no client data; expected {_WANTED}; found {contents}")


def _saved(path: Path, entries: Sequence[Path]) -> Layout:
    """What `save_to_disk` has left: one table, or a folder for each split."""
    named = [entry.name for entry in entries if any((entry / name).is_file() for name in SAVED_AS)]
    if not named:
        return Layout(path, (Source(path, None, "train"),))
    if "train" not in named:
        raise DataError(f"{path}: no split 'train'; the dataset's splits are {listed(named)}")
    sources = tuple(Source(path / split, None, split) for split in SPLITS if split in named)
    return Layout(path, sources, tuple(name for name in named if name not in SPLITS))


def not_read(ignored: Sequence[str]) -> str:
    """A sentence about the files of no layout, with the names that they may be meant to have."""
    names = []
    for name in ignored[:10]:
        meant = _MEANT.fullmatch(name)
        split = {"train": "train", "val": "validation", "test": "test"}
        hint = f" ({meant[1]}.{split[meant[2].lower()]}.jsonl?)" if meant else ""
        names.append(shown(f"{name}{hint}", 240))
    more = f" and {len(ignored) - 10} more" if ignored[10:] else ""
    return (
        "ignored, because not named NAME.train.jsonl, NAME.validation.jsonl or NAME.test.jsonl: "
        f"{', '.join(names)}{more}"
    )


def _unread(path: Path, visible: Sequence[Path], sources: Sequence[Source]) -> tuple[str, ...]:
    """What lies in a folder of client data and is not read, but for what is no data."""
    read = {source.file for source in sources}
    below = [file for entry in visible if entry.is_dir() for file in _entries(entry)]
    unread = [entry for entry in visible if not entry.is_dir() and entry.name != PARTITION_FILE]
    unread += [file for file in below if not file.is_dir() and file.suffix in (".json", ".jsonl")]
    return tuple(
        file.relative_to(path).as_posix()
        for file in unread
        if file not in read and not _NO_DATA.fullmatch(file.name)
    )


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files left out."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _client_of(file: Path) -> str:
    """The name of a file of records without its ending; "" for any other file."""
    match = _DATA.fullmatch(file.name)
    return match[1] if match else ""


def _source(file: Path) -> Source | None:
    if match := _NAMED.fullmatch(file.name):
        return Source(file, match[1], next(split for split in SPLITS if split == match[2]))
    if match := _REFERENCE.fullmatch(file.name):
        return Source(file, match[2], "train" if match[1] == "training" else "test")
    return None


def _one_file(file: Path) -> Layout:
    """A file with a client column, and its siblings for the other splits."""
    wanted = f"{file}: expected a file of records with a column that names the client"
    if (not_records := other_format(file)) is not None:
        raise DataError(f"{wanted}, but {not_records}")
    if not (name := _client_of(file)):
        raise DataError(f"{wanted}, its name ending in .jsonl, .json, .csv, .tsv or .parquet")
    sources = [Source(file, None, "train")]
    begin, end = name.removesuffix("train"), file.name.removeprefix(name)
    if begin != name and (not begin or begin.endswith(".")):
        siblings = [(file.with_name(f"{begin}{split}{end}"), split) for split in SPLITS[1:]]
        sources += [Source(other, None, split) for other, split in siblings if other.is_file()]
    return Layout(file.parent, tuple(sources))


def _seen(path: Path, entries: list[Path]) -> str:
    """What a folder without client data holds instead, and which subfolder may be meant."""
    if not entries:
        return "an empty folder"
    names = listed(entry.name for entry in entries)
    for entry in entries:
        if entry.is_dir() and any(map(_source, _entries(entry))):
            return f"{names}; did you mean {path / entry.name}?"
    return names
