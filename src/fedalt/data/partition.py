"""Client folders out of one file: by a column, by a Dirichlet draw over labels, in equal parts."""

import hashlib
import heapq
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedalt.core.files import make_private_folder, open_private
from fedalt.core.seeds import generator, seed_of
from fedalt.data.jsonl import read_items
from fedalt.data.layouts import PARTITION_FILE
from fedalt.data.names import fault_of_names
from fedalt.data.records import Columns, DataError, Problems, parse_record, record_key
from fedalt.data.task import hold_out

Groups = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How one file is divided among clients.

    "column": one client per value of `column`. "dirichlet": `clients` clients; each value of
    `column` is divided in shares drawn from Dirichlet(`alpha`), the smaller alpha the less alike;
    a client below `minimum` records gets some of the largest. "equal": `clients` random parts.
    `test` is the fraction of each client's records that becomes its test file.
    """

    by: Literal["column", "dirichlet", "equal"]
    column: str | None = None
    clients: int | None = None
    alpha: float = 0.5
    minimum: int = 10
    test: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("column", "dirichlet", "equal"):
            raise ValueError(f"by={self.by!r} is none of column, dirichlet, equal")
        if self.by != "equal" and not self.column:
            raise ValueError(f"a split by {self.by} needs the name of a column")
        if self.by != "column" and (self.clients is None or self.clients < 1):
            raise ValueError(f"clients={self.clients}, but a split by {self.by} makes at least one")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}, but a Dirichlet draw needs one above 0")
        if self.minimum < 1:
            raise ValueError(f"minimum={self.minimum}, but a client has at least one record")
        if not 0 <= self.test < 1:
            raise ValueError(f"test={self.test}, but the fraction is at least 0 and below 1")


@dataclass(frozen=True)
class Divided:
    """What a split made: records per client and split, and how many were moved for the minimum.

    `names` are the column's values by client id, where the ids stand for values.
    """

    source: str
    source_sha256: str
    settings: Partition
    counts: dict[str, dict[str, int]]
    names: dict[str, str]
    moved: int


@dataclass(frozen=True)
class _Read:
    """Every record as one line of JSON, its key and its value of the column.

    `first_of_label` holds the key of one record for every label of a classifier.
    """

    rows: list[str]
    keys: list[int]
    values: list[str]
    first_of_label: frozenset[int]


def divide(
    source: Path,
    target: Path,
    partition: Partition,
    columns: Columns = Columns(),
) -> Divided:
    """Write the client files of `source` into the new folder `target`, all or nothing."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists already; expected a new or empty folder")
    read = _read(source, partition.column, columns)
    names: dict[str, str] = {}
    moved = 0
    if partition.by == "column":
        groups, names = _by_column(read.values, source)
    elif partition.by == "dirichlet":
        groups, moved = by_dirichlet(read.values, partition)
    else:
        groups = in_equal_parts(len(read.rows), partition)
    counts: dict[str, dict[str, int]] = {}
    files: dict[str, list[str]] = {}
    for client_id, members in sorted(groups.items()):
        tested = _test_part(read, members, client_id, partition)
        parts = {
            "train": [read.rows[index] for index in members if index not in tested],
            "test": [read.rows[index] for index in members if index in tested],
        }
        counts[client_id] = {split: len(lines) for split, lines in parts.items()}
        files |= {f"{client_id}.{split}.jsonl": lines for split, lines in parts.items() if lines}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    divided = Divided(source.name, digest, partition, counts, names, moved)
    files[PARTITION_FILE] = [json.dumps(asdict(divided), indent=2, ensure_ascii=False)]
    _write(target, files)
    return divided


def by_dirichlet(values: Sequence[str], partition: Partition) -> tuple[Groups, int]:
    """Members of each client, in file order, and how many were moved to reach the minimum."""
    assert partition.clients is not None
    ids = _client_ids(partition.clients)
    if len(values) < partition.minimum * len(ids):
        raise DataError(
            f"{len(values)} records cannot give {len(ids)} clients {partition.minimum} each"
        )
    random = np.random.default_rng(seed_of(partition.seed, "dirichlet"))
    parts: list[list[int]] = [[] for _ in ids]
    by_value: Groups = {}
    for index, value in enumerate(values):
        by_value.setdefault(value, []).append(index)
    for _, records in sorted(by_value.items()):
        members = random.permutation(records)
        shares = random.dirichlet(np.full(len(ids), partition.alpha))
        if not np.isfinite(shares).all():
            raise DataError(f"alpha={partition.alpha} is too small to draw shares with; raise it")
        ends = np.round(np.cumsum(shares) * len(members)).astype(int)[:-1]
        for part, piece in zip(parts, np.split(members, ends), strict=True):
            part += piece.tolist()
    moved = _reach_minimum(parts, partition.minimum, random)
    return {client_id: sorted(part) for client_id, part in zip(ids, parts, strict=True)}, moved


def _reach_minimum(parts: list[list[int]], minimum: int, random: np.random.Generator) -> int:
    """Give the parts that are too small some of the largest one; returns how many were moved."""
    moved = 0
    by_size = [(-len(part), number) for number, part in enumerate(parts)]
    heapq.heapify(by_size)
    for small in parts:
        while len(small) < minimum:
            size, number = heapq.heappop(by_size)
            small.append(parts[number].pop(int(random.integers(-size))))
            heapq.heappush(by_size, (size + 1, number))
            moved += 1
    return moved


def in_equal_parts(records: int, partition: Partition) -> Groups:
    """Members of each client, in file order; the parts differ by one record at most."""
    assert partition.clients is not None
    ids = _client_ids(partition.clients)
    if records < len(ids):
        raise DataError(f"{records} records cannot be divided among {len(ids)} clients")
    random = np.random.default_rng(seed_of(partition.seed, "equal"))
    parts = np.array_split(random.permutation(records), len(ids))
    return {client_id: sorted(part.tolist()) for client_id, part in zip(ids, parts, strict=True)}


def _by_column(values: Sequence[str], source: Path) -> tuple[Groups, dict[str, str]]:
    """Members of each client, and the value that each client id stands for."""
    problems = Problems(source)
    groups: Groups = {}
    names: dict[str, str] = {}
    spelling: dict[str, str] = {}
    for index, value in enumerate(values):
        client_id = re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip(".")
        if client_id not in groups and (fault := fault_of_names([client_id])):
            problems.add(f"value {value!r}", fault)
        same = spelling.setdefault(client_id.casefold(), value)
        if same != value:
            problems.add(f"value {value!r}", f"gives the same file name as {same!r}")
        names[client_id] = value
        groups.setdefault(client_id, []).append(index)
    problems.raise_if_any()
    return groups, names


def _client_ids(clients: int) -> list[str]:
    """Names that sort in the order of their numbers."""
    width = len(str(clients - 1))
    return [f"client_{number:0{width}}" for number in range(clients)]


def _test_part(read: _Read, members: list[int], client_id: str, partition: Partition) -> set[int]:
    """Those of a client's records that become its test file; repetitions stay together."""
    # The first record of every label stays in train: nobody could learn a label of test alone.
    free = [index for index in members if read.keys[index] not in read.first_of_label]
    if partition.test == 0 or len(members) < 2:
        return set()
    wanted = min(len(members) - 1, max(1, round(partition.test * len(members))))
    random = generator(partition.seed, "test", client_id)
    return {free[at] for at in hold_out([read.keys[index] for index in free], wanted, random)}


def _read(source: Path, column: str | None, columns: Columns) -> _Read:
    if not source.is_file():
        raise DataError(f"{source}: no such file; expected JSON lines, a JSON list or a table")
    problems = Problems(source)
    rows, keys, values = [], [], []
    firsts: dict[str, int] = {}
    for item in read_items(source, source.name, problems):
        place = f"{source.name}:{item.line}"
        try:
            record = parse_record(item.value, columns)
        except DataError as error:
            problems.add(place, str(error))
            continue
        assert isinstance(item.value, dict)
        value = item.value.get(column) if column else ""
        if not isinstance(value, str | int) or isinstance(value, bool):
            problems.add(place, f"field {column!r}: expected a name or a whole number")
            continue
        rows.append(_line(columns.renamed(item.value)))
        keys.append(record_key(record))
        values.append(str(value))
        if record.kind == "classify":
            firsts.setdefault(record.answer, keys[-1])
    problems.raise_if_any()
    if not rows:
        raise DataError(f"{source}: holds no records")
    return _Read(rows, keys, values, frozenset(firsts.values()))


def _line(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)  # a table may hold dates
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is no part of the record
        return json.dumps(value, default=str)
    return text


def _write(target: Path, files: dict[str, list[str]]) -> None:
    """A folder with these files, or, if anything fails, nothing."""
    make_private_folder(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, lines in files.items():
            with open_private(partial / name, "wb") as stream:
                stream.writelines(f"{line}\n".encode() for line in lines)
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
