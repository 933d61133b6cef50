"""Which files of a folder hold whose data: the three layouts that client data may have."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedalt.core.foreign import listed, shown
from fedalt.data.examples import Split
from fedalt.data.formats import other_format
from fedalt.data.jsonl import holds_list
from fedalt.data.names import fault_of_names
from fedalt.data.records import DataError, Problems

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PARTITION_FILE = "split.json"  # written beside client files that were made from one file

_NAMED = re.compile(r"(.+)\.(train|validation|test)\.jsonl")
_REFERENCE = re.compile(r"local_(training|testing)_(\d+)\.jsonl?")
# What people call the three splits, and what such a file may end with.
_MEANT = re.compile(r"(.+)[._-](train|val|test)(?:ing|id|idation)?\.(?:jsonl?|ndjson|txt)", re.I)
_NO_DATA = re.compile(r"(readme|licen[sc]e|notice|changelog|makefile)(\..*)?", re.I)
_WANTED = (
    "NAME.train.jsonl (with NAME.test.jsonl and NAME.validation.jsonl), "
    "local_training_K.json (with local_testing_K.jsonl), "
    "or one .jsonl file with a column that names the client"
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

    The reference layout may keep its two kinds of files in the subfolders `train` and `test`.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a folder with {_WANTED}")
    if path.is_file():
        return _one_file(path)
    visible = _entries(path)
    files = [entry for entry in visible if not entry.is_dir()]
    candidates = list(files)
    for name in ("train", "test"):
        if (path / name).is_dir():
            inside = _entries(path / name)
            candidates += [file for file in inside if _REFERENCE.fullmatch(file.name)]
    sources = [source for file in candidates if (source := _source(file)) is not None]
    if sources:
        return Layout(path, tuple(sources), _unread(path, visible, sources))
    lines = [file for file in files if file.suffix == ".jsonl"]
    if len(lines) == 1 or path / "train.jsonl" in lines:
        one = _one_file(lines[0] if len(lines) == 1 else path / "train.jsonl")
        return replace(one, ignored=_unread(path, visible, one.sources))
    found = _seen(path, visible)
    for file in files:
        if not _NO_DATA.fullmatch(file.name) and (other := other_format(file)) is not None:
            found += f"; {file.name}: {other}"
            break
    raise DataError(f"{path}: no client data; expected {_WANTED}; found {found}")


def not_read(ignored: Sequence[str]) -> str:
    """A sentence about the files of no layout, with the names that they may be meant to have."""
    told = []
    for name in ignored[:10]:
        meant = _MEANT.fullmatch(name)
        split = {"train": "train", "val": "validation", "test": "test"}
        hint = f" ({meant[1]}.{split[meant[2].lower()]}.jsonl?)" if meant else ""
        told.append(shown(f"{name}{hint}", 240))
    more = f" and {len(ignored) - 10} more" if ignored[10:] else ""
    return (
        "ignored, because not named NAME.train.jsonl, NAME.validation.jsonl or NAME.test.jsonl: "
        f"{', '.join(told)}{more}"
    )


def _unread(path: Path, visible: Sequence[Path], sources: Sequence[Source]) -> tuple[str, ...]:
    """What lies in a folder of client data and is not read, but for what is no data."""
    taken = {source.file for source in sources}
    found = []
    for entry in visible:
        if entry.is_dir():
            inside = [each for each in _entries(entry) if not each.is_dir()]
            found += [
                each.relative_to(path).as_posix()
                for each in inside
                if each not in taken
                and each.suffix in (".json", ".jsonl")
                and not _NO_DATA.fullmatch(each.name)
            ]
        elif entry not in taken and entry.name != PARTITION_FILE:
            found += [] if _NO_DATA.fullmatch(entry.name) else [entry.name]
    return tuple(found)


def require_safe(client_id: str, place: str, problems: Problems) -> None:
    """Note a client id that cannot name a folder everywhere."""
    if fault := fault_of_names([client_id]):
        problems.add(place, fault)


def require_distinct(layout: Layout, problems: Problems) -> None:
    """Note client names in file names that are not safe, or that differ only in case."""
    spelling: dict[str, Source] = {}
    for source in layout.sources:
        if source.client_id is None:
            continue
        place = layout.place(source.file)
        require_safe(source.client_id, place, problems)
        same = spelling.setdefault(source.client_id.casefold(), source)
        if same.client_id != source.client_id:
            other = f"{same.client_id!r} of {layout.place(same.file)}"
            problems.add(place, f"client {source.client_id!r} differs from {other} in case only")


def require_train(layout: Layout, problems: Problems) -> None:
    """Note clients with a file for validation or test but none to train on."""
    trained = {source.client_id for source in layout.sources if source.split == "train"}
    for source in layout.sources:
        if source.client_id not in trained:
            problems.add(
                layout.place(source.file),
                f"client {source.client_id!r} has {source.split} data but no train file",
            )


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files left out."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _source(file: Path) -> Source | None:
    if match := _NAMED.fullmatch(file.name):
        return Source(file, match[1], _split(match[2]))
    if match := _REFERENCE.fullmatch(file.name):
        return Source(file, match[2], "train" if match[1] == "training" else "test")
    return None


def _split(name: str) -> Split:
    splits: dict[str, Split] = {split: split for split in SPLITS}
    return splits[name]


def _one_file(file: Path) -> Layout:
    """A file with a client column, and its siblings for the other splits."""
    if (other := other_format(file)) is not None:
        wanted = "expected a .jsonl file with a column that names the client"
        raise DataError(f"{file}: {wanted}, but {other}")
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: expected a .jsonl file with a column that names the client")
    try:
        with file.open("rb") as stream:
            if holds_list(stream.read(4096)):
                raise DataError(f"{file}: holds one JSON list; expected one JSON object per line")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    sources = [Source(file, None, "train")]
    begin = file.name.removesuffix("train.jsonl")
    if begin != file.name and (not begin or begin.endswith(".")):
        others: tuple[Literal["validation", "test"], ...] = ("validation", "test")
        for split in others:
            sibling = file.with_name(f"{begin}{split}.jsonl")
            if sibling.is_file():
                sources.append(Source(sibling, None, split))
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
