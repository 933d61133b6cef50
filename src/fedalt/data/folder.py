"""A folder of client data: opened and checked once, then read client by client."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedalt.data.examples import Kind, Split
from fedalt.data.jsonl import Item, read_at, read_items
from fedalt.data.layouts import SPLITS, Layout, Source, find_layout
from fedalt.data.names import fault_of_names
from fedalt.data.records import Columns, DataError, Problems, Record, parse_record
from fedalt.data.tables import UNREADABLE

CLIENT_FIELDS = ("client", "client_id")


@dataclass(frozen=True)
class Part:
    """Where one client's records of one split lie; `starts` are their bytes in a shared file."""

    file: Path
    records: int
    starts: "array[int] | None" = None


@dataclass(frozen=True)
class DataFolder:
    """Client data on disk that has been checked.

    `clients` are sorted; `labels` are those of the train files, sorted, whole numbers by value,
    and empty unless `kind` is "classify"; `fingerprint` is 64 hex digits over clients, splits and
    records; `ignored` are files that belong to no layout. No text is held in memory.
    """

    path: Path
    clients: tuple[str, ...]
    kind: Kind
    labels: tuple[str, ...]
    fingerprint: str
    ignored: tuple[str, ...]
    parts: Mapping[tuple[str, Split], Part] = field(repr=False)
    columns: Columns = Columns()

    def counts(self, client_id: str, split: Split) -> int:
        """How many records a client has in a split; 0 if it has none."""
        part = self._part(client_id, split)
        return 0 if part is None else part.records

    def records(self, client_id: str, split: Split) -> list[Record]:
        """A client's records of a split, read from disk at each call; [] if it has none."""
        part = self._part(client_id, split)
        if part is None:
            return []
        problems = Problems(part.file)
        try:
            if part.starts is None:
                items = read_items(part.file, part.file.name, problems)
                values: Iterator[object] = (item.value for item in items)
            else:
                values = read_at(part.file, part.starts)
            records = [parse_record(value, self.columns) for value in values]
        except (*UNREADABLE, ValueError) as error:
            raise DataError(f"{part.file}: changed since it was opened ({error})") from error
        problems.raise_if_any()
        if len(records) != part.records:
            raise DataError(
                f"{part.file}: changed since it was opened, {len(records)} records "
                f"instead of {part.records}"
            )
        return records

    def places(self, client_id: str, split: Split) -> list[str]:
        """Where each of these records lies, as FILE:LINE; read from disk, for errors alone."""
        part = self._part(client_id, split)
        if part is None:
            return []
        items = read_items(part.file, part.file.name, Problems(part.file))
        starts = None if part.starts is None else set(part.starts)
        return [
            f"{part.file.name}:{item.line}"
            for item in items
            if starts is None or item.start in starts
        ]

    def _part(self, client_id: str, split: Split) -> Part | None:
        if (client_id, "train") not in self.parts:
            raise DataError(f"{self.path}: no client {client_id!r}")
        return self.parts.get((client_id, split))


def open_data(
    path: Path,
    columns: Columns = Columns(),
    *,
    labels: Sequence[str] = (),
) -> DataFolder:
    """Check every line of every file once and remember where the records are.

    The client columns `client` and `client_id` of a single file need not be named. `labels` are
    those that are agreed on, in their order, where the records here are some of several places':
    these need not have all of them. All that is wrong ends in one DataError.
    """
    layout = find_layout(path)
    problems = Problems(path)
    survey = _Survey(layout, columns, problems, labels)
    for source in layout.sources:
        survey.read(source)
    survey.finish()
    problems.raise_if_any()
    assert survey.kind is not None
    return DataFolder(
        path=path,
        clients=tuple(sorted({client_id for client_id, _ in survey.parts})),
        kind=survey.kind[0],
        labels=survey.sorted_labels(),
        fingerprint=survey.fingerprint(),
        ignored=layout.ignored,
        parts=survey.parts,
        columns=columns,
    )


def _assigned(
    source: Source, layout: Layout, column: str | None, problems: Problems
) -> Iterator[tuple[Item, str, Split]]:
    """The values of a file, each with its client and split."""
    place = layout.place(source.file)
    for item in read_items(source.file, place, problems):
        if source.client_id is not None:
            yield item, source.client_id, source.split
            continue
        where = f"{place}:{item.line}"
        if not isinstance(item.value, dict):
            problems.add(where, "expected a JSON object")
            continue
        if column is None:
            column = next((name for name in CLIENT_FIELDS if name in item.value), None)
        if column is None:
            # Without a column every further line would be wrong for the same reason.
            names = ", ".join(list(item.value)[:8])
            problems.add(where, f"no column {' or '.join(CLIENT_FIELDS)} among the fields {names}")
            return
        client = item.value.get(column)
        if not isinstance(client, str | int) or isinstance(client, bool):
            problems.add(where, f"field {column!r}: expected a client's name or number")
            continue
        near = {name for name in item.value if name.strip().casefold() == "split"} - {"split"}
        if near:
            problems.add(where, f"column {min(near)!r}: expected 'split', spelt exactly so")
            return  # test records must not train; every further line is wrong in the same way
        split = item.value.get("split", source.split)
        if split not in SPLITS:
            problems.add(where, f"field 'split': {split!r} is none of {', '.join(SPLITS)}")
            continue
        yield item, str(client), split


class _Survey:
    """What one pass over all files finds out; holds counts, digests and offsets, never text."""

    def __init__(
        self, layout: Layout, columns: Columns, problems: Problems, agreed: Sequence[str]
    ) -> None:
        self.parts: dict[tuple[str, Split], Part] = {}
        self.labels: set[str] = set()
        self.kind: tuple[Kind, str] | None = None
        self._layout, self._columns = layout, columns
        self._problems, self._agreed = problems, agreed
        self._digests: dict[tuple[str, Split], str] = {}
        self._hashes: dict[tuple[str, Split], hashlib._Hash] = {}
        self._starts: dict[tuple[str, Split], array[int]] = {}
        self._files: dict[tuple[str, Split], Path] = {}
        self._names: dict[str, Source] = {}  # by client, where its name first stands
        self._spelling: dict[str, str] = {}
        self._unproven: dict[str, str] = {}
        self._refused: set[tuple[str, Split]] = set()  # which have records that are wrong
        self._reported: set[tuple[str, str, Split]] = set()

    def read(self, source: Source) -> None:
        """Check every record of a file and count it."""
        place, before, empty = self._layout.place(source.file), self._problems.count, True
        column = self._columns.client
        if source.client_id is not None:
            self._name(source.client_id, source, place, f" of {place}")
            before = self._problems.count
        for item, client_id, split in _assigned(source, self._layout, column, self._problems):
            empty = False
            self._name(client_id, source, f"{place}:{item.line}")
            self._add(source.file, item, (client_id, split))
        if empty and self._problems.count == before:
            self._problems.add(place, "holds no records")
        if source.client_id is not None:
            self._seal((source.client_id, source.split), shared=False)

    def finish(self) -> None:
        """What can only be said when all files are read."""
        for key in sorted(self._hashes):
            self._seal(key, shared=True)
        self._require_train()
        if self._agreed or any(split == "train" for _, split in self._refused):
            return  # which labels there are is then not known
        for label in sorted(self._unproven.keys() - self.labels):
            self._problems.add(
                self._unproven[label], f"field 'label': no train record has the label {label!r}"
            )
        if self.kind is not None and self.kind[0] == "classify" and len(self.labels) == 1:
            self._problems.add(
                self.kind[1],
                f"all train records have the label {min(self.labels)!r}; a classifier has two or "
                "more (a client of a federation may have one: the agreed labels count there)",
            )

    def _require_train(self) -> None:
        """Note clients with records or files for validation or test but none to train on."""
        with_file = {source.client_id for source in self._layout.sources if source.split == "train"}
        for client_id, source in sorted(self._names.items()):
            key: tuple[str, Split] = (client_id, "train")
            if source.client_id is None and key not in self.parts.keys() | self._refused:
                self._problems.add(f"client {client_id!r}", "has no train records")
            elif source.client_id is not None and client_id not in with_file:
                self._problems.add(
                    self._layout.place(source.file),
                    f"client {client_id!r} has {source.split} data but no train file",
                )

    def sorted_labels(self) -> tuple[str, ...]:
        """What a classifier's outputs stand for, in their order: 10 comes after 2."""
        if self._agreed and self.kind is not None and self.kind[0] == "classify":
            return tuple(self._agreed)
        if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in self.labels):
            return tuple(sorted(self.labels, key=lambda label: (int(label), label)))
        return tuple(sorted(self.labels))

    def fingerprint(self) -> str:
        """64 hex digits; the order of the records counts, the files' format does not."""
        lines = [f"{client}/{split}/{digest}" for (client, split), digest in self._digests.items()]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def _add(self, file: Path, item: Item, key: tuple[str, Split]) -> None:
        place = f"{self._layout.place(file)}:{item.line}"
        try:
            record = parse_record(item.value, self._columns)
        except DataError as error:
            self._problems.add(place, str(error))
            self._refused.add(key)
            return
        self._agree(record.kind, key, place)
        client_id, split = key
        if record.kind == "classify" and self._agreed and record.answer not in self._agreed:
            wanted = ", ".join(self._agreed)
            text = f"field 'label': {record.answer!r} is none of the agreed labels {wanted}"
            self._once(place, text, key)
        if record.kind == "classify" and split == "train":
            self.labels.add(record.answer)
        elif record.kind == "classify":
            self._unproven.setdefault(record.answer, place)
        if self._files.setdefault(key, file) != file:
            other = self._layout.place(self._files[key])
            self._once(place, f"client {client_id!r} already has {split} data in {other}", key)
            return
        self._starts.setdefault(key, array("Q")).append(item.start)
        # The same for a record in any layout. Only a conversation with calls has a `whole`.
        line = json.dumps({name: v for name, v in vars(record).items() if name != "whole" or v})
        self._hashes.setdefault(key, hashlib.sha256()).update(f"{line}\n".encode())

    def _seal(self, key: tuple[str, Split], *, shared: bool) -> None:
        """End a client's split; only in a file shared by clients its offsets are needed on."""
        if key not in self._hashes:
            return
        self._digests[key] = self._hashes.pop(key).hexdigest()
        starts = self._starts.pop(key)
        self.parts[key] = Part(self._files[key], len(starts), starts if shared else None)

    def _name(self, client_id: str, source: Source, place: str, of: str = "") -> None:
        """Check a client's name where it first stands: in a file's name or in a column."""
        if client_id in self._names:
            return
        self._names[client_id] = source
        if fault := fault_of_names([client_id]):
            self._problems.add(place, fault)
        other = self._spelling.setdefault(client_id.casefold(), f"{client_id!r}{of}")
        if other != f"{client_id!r}{of}":
            self._problems.add(place, f"client {client_id!r} differs from {other} in case only")

    def _agree(self, kind: Kind, key: tuple[str, Split], place: str) -> None:
        if self.kind is None:
            self.kind = (kind, place)
        elif self.kind[0] != kind:
            wanted = f"{self.kind[1]} is one to {self.kind[0]}: all clients have the same kind"
            self._once(place, f"a record to {kind}, but {wanted}", key)

    def _once(self, place: str, text: str, key: tuple[str, Split]) -> None:
        """Note a problem that every record of a split has at its first one only."""
        if (text, *key) not in self._reported:
            self._reported.add((text, *key))
            self._problems.add(place, text)
