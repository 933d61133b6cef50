"""A run's folder: settings, the record of rounds, and states that no crash leaves in pieces.

    run.json                    format, versions, data and model fingerprints
    settings.toml               the resolved settings
    rounds.jsonl                one line per client, evaluation and round
    examples.jsonl              a few test examples of each client in full: private, like the data
    progress.json               how far the run is; replacing this file commits a round
    clients/ID/0007.safetensors a client's state after round 7, and server/ likewise
    server/latest/ID/...        each client's last upload, for methods that keep a ledger
    local/...                   the same for the local-only yardstick
    refused.jsonl, quarantine/  uploads that do not count: why, and their bytes
    waiting/                    uploads of a round that has to see all before it judges one

A state is read as the newest file up to a round and written as the file of the next one, so that
what a crashed round has left behind is never read, only overwritten.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedalt.codec import atomic_write, fields_of, read, write
from fedalt.engine.course import Line, Progress
from fedalt.files import AtOnce, Writer
from fedalt.methods.contract import Ledger, Message
from fedalt.quarantine import quarantine
from fedalt.record import (
    FORMAT,
    Standing,
    StoreError,
    read_facts,
    read_standing,
    require_run,
)

__all__ = [
    "FileLedger",
    "FileStates",
    "RunFolder",
    "StoreError",
    "create",
    "kept_rounds",
    "locked",
    "newest",
    "open_run",
    "prune",
    "require_unused",
]
T = TypeVar("T")
_AREAS = ("clients", "server", "moments")
_STATE = re.compile(r"([0-9]+)\.safetensors")


@dataclass(frozen=True)
class FileStates:
    """An arm's states on disk: read as after round `round` - 1, written for `round`.

    What the `writer` has not finished yet is of this round, which is never read here.
    """

    folder: Path
    round: int
    writer: Writer = field(default_factory=AtOnce)

    def get(self, key: str, cls: type[T]) -> T | None:
        """The newest value of a key that is older than this round."""
        path = newest(self.folder / key, self.round - 1)
        if path is None:
            return None
        ledgers = fields_of(cls, Ledger)
        given = {name: self._ledger(key, name) for name in ledgers}
        return read(cls, path, given=given)

    def put(self, key: str, value: object) -> None:
        """Write a value beside its older ones; a ledger's entries are in files already."""
        path = self.folder / key / _file(self.round)
        ledgers = fields_of(type(value), Ledger)
        self.writer.write(partial(_write, path, value, omit=ledgers))
        for name in ledgers:
            self._adopt(self._ledger(key, name), getattr(value, name))

    def begin(self) -> None:
        """Forget what an attempt at this round that was cut short has left: it never counted."""
        for area in _AREAS:
            self.drop(area)

    def drop(self, key: str) -> None:
        """Forget what was written for this round under a key and below it."""
        self.writer.finish()  # a write that came later would count
        for path in sorted((self.folder / key).rglob(_file(self.round))):
            if path.is_file():
                path.unlink()

    @contextmanager
    def waiting(self) -> Iterator[Path]:
        """An empty folder for uploads of this round; without its content nothing is lost."""
        folder = self.folder / "waiting"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def quarantine(self, client_id: str, reason: str, data: bytes, limit: int) -> None:
        """Note a refused upload of this round beside the run's record, and keep it if it fits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        quarantine(self.folder, self.round, client_id, reason=reason, data=data, limit=limit)

    def backed(self, key: str, value: T) -> T:
        """The same value with ledgers that keep their entries in files from the first on."""
        names = fields_of(type(value), Ledger)
        return replace(value, **{name: self._ledger(key, name) for name in names})  # type: ignore[type-var]

    def _ledger(self, key: str, name: str) -> "FileLedger":
        return FileLedger(self.folder / key / name, self.round, self.writer)

    @staticmethod
    def _adopt(ours: "FileLedger", given: Ledger) -> None:
        """Put the entries of a ledger in memory, as a method starts with, into files."""
        if isinstance(given, dict):
            for client_id, message in given.items():
                ours.put(client_id, message)


@dataclass(frozen=True)
class FileLedger:
    """The latest upload of every client, a folder of files each."""

    folder: Path
    round: int
    writer: Writer = field(default_factory=AtOnce)
    left: frozenset[str] = frozenset()

    def __contains__(self, client_id: object) -> bool:
        """Whether this client uploaded before this round."""
        if client_id in self.left:
            return False
        return newest(self._place(str(client_id)), self.round - 1) is not None

    def __getitem__(self, client_id: str) -> Message:
        """The client's newest upload from before this round."""
        path = newest(self._place(client_id), self.round - 1)
        if path is None or client_id in self.left:
            raise KeyError(client_id)
        return read(Message, path)

    def clients(self) -> list[str]:
        """Every client that uploaded before this round, sorted."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if path.name in self)

    def without(self, client_id: str) -> "FileLedger":
        """The same folder, but for this client; its files stay."""
        return replace(self, left=self.left | {client_id})

    def put(self, client_id: str, message: Message) -> "FileLedger":
        """Write this round's upload; it counts once the round is committed."""
        path = self._place(client_id) / _file(self.round)
        self.writer.write(partial(_write, path, message))
        return self

    def _place(self, client_id: str) -> Path:
        """The client's folder; an id that leads elsewhere is refused."""
        if client_id in ("", "..") or client_id != Path(client_id).name:
            raise StoreError(f"client {client_id!r}: such an id cannot name a folder")
        return self.folder / client_id


@dataclass(frozen=True)
class RunFolder:
    """The journal of a run, on disk. Use it within `locked`."""

    path: Path
    writer: Writer = field(default_factory=AtOnce)

    def progress(self) -> Progress:
        """How far the run is; the record is cut back to what was committed with that."""
        now = self._standing()
        record = self.path / "rounds.jsonl"
        if record.exists() and record.stat().st_size > now.record_bytes:
            os.truncate(record, now.record_bytes)
        return Progress(now.rounds_done, now.best, now.tested)

    def states(self, column: str, round_: int) -> FileStates:
        """The yardstick has a folder of its own; the method asked for lies at the top."""
        self.writer.finish()  # it may be what is read now
        folder = self.path / "local" if column == "local" else self.path
        return FileStates(folder, round_, self.writer)

    def record(self, line: Line) -> None:
        """Append a line to rounds.jsonl."""
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def keep_examples(self, lines: Sequence[Line]) -> None:
        """Replace examples.jsonl."""
        whole = "".join(_compact(line) + "\n" for line in lines)
        atomic_write(self.path / "examples.jsonl", whole.encode())

    def commit(self, progress: Progress) -> None:
        """Make the round count by replacing progress.json, then drop states no one needs."""
        self.writer.finish()
        record = self.path / "rounds.jsonl"
        with record.open("a") as file:
            os.fsync(file.fileno())
        raw = {
            "rounds_done": progress.rounds_done,
            "best": {column: list(best) for column, best in progress.best.items()},
            "tested": progress.tested,
            "record_bytes": record.stat().st_size,
        }
        atomic_write(self.path / "progress.json", json.dumps(raw).encode())
        for column in ("own", "local"):
            prune(self.states(column, 0).folder, kept_rounds(progress, column))

    def lines(self) -> list[dict[str, Any]]:
        """Everything committed to rounds.jsonl."""
        record = self.path / "rounds.jsonl"
        if not record.exists():
            return []
        whole = record.read_bytes()[: self._standing().record_bytes]
        return [json.loads(line) for line in whole.decode().splitlines()]

    def best_loss(self) -> float | None:
        """The lowest mean validation loss of the method asked for, if any was measured."""
        best = self._standing().best.get("own")
        return None if best is None else best[1]

    def rounds_done(self) -> int:
        """How many rounds are committed; unlike `progress` safe while another process writes."""
        return self._standing().rounds_done

    def facts(self) -> dict[str, Any]:
        """What run.json holds."""
        return read_facts(self.path)

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """Add to what run.json holds, or replace a part of it."""
        whole = json.dumps({**self.facts(), **facts}, indent=2) + "\n"
        atomic_write(self.path / "run.json", whole.encode())

    def left(self) -> frozenset[str]:
        """The clients that have left the run."""
        return frozenset(self.facts().get("left", ()))

    def _standing(self) -> Standing:
        return read_standing(self.path)


def kept_rounds(progress: Progress, column: str) -> list[int]:
    """The rounds after which an arm's states are kept: the last two and the best one."""
    best = [progress.best[column][0]] if column in progress.best else []
    last = range(max(0, progress.rounds_done - 2), progress.rounds_done)
    return sorted({*last, *best})


def require_unused(path: Path) -> None:
    """Refuse a folder for a new run that holds anything already."""
    if path.exists() and not (path.is_dir() and _is_empty(path)):
        hint = f"; `fedalt resume {path}` continues it" if (path / "run.json").exists() else ""
        raise StoreError(f"{path} exists already and is not empty{hint}")


def create(path: Path, settings: str, facts: Mapping[str, object]) -> RunFolder:
    """Make a run's folder; one that holds anything already is refused."""
    require_unused(path)
    path.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({"format": FORMAT, **facts}, indent=2) + "\n"
    atomic_write(path / "settings.toml", settings.encode())
    try:
        atomic_write(path / "run.json", whole.encode())
    except BaseException:  # half a run could be neither resumed nor begun again
        (path / "settings.toml").unlink()
        raise
    return RunFolder(path)


def open_run(path: Path) -> RunFolder:
    """An existing run's folder, if it is one and of this format."""
    require_run(path)
    return RunFolder(path)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Keep every other process out of a run's folder; a dead process holds no lock.

    A process that is given the descriptor holds the lock too.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"another process is using {path}") from None
        yield file.fileno()


def newest(folder: Path, round_: int) -> Path | None:
    """The newest file of a state up to a round."""
    if not folder.is_dir():
        return None
    there = _rounds(each.name for each in folder.iterdir())
    found = [number for number in there if number <= round_]
    return folder / _file(max(found)) if found else None


def _compact(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _is_empty(folder: Path) -> bool:
    return all(entry.name == ".lock" for entry in folder.iterdir())


def _file(round_: int) -> str:
    return f"{round_:04d}.safetensors"


def _write(path: Path, value: object, omit: Collection[str] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, value, omit=omit)


def _rounds(files: Iterable[str]) -> list[int]:
    """The rounds of which these files are states; other files are none."""
    return [int(found[1]) for name in files if (found := _STATE.fullmatch(name))]


def prune(folder: Path, keep: list[int]) -> None:
    """Drop every state file that is not the newest one of any of these rounds."""
    for area in _AREAS:
        for parent, _, files in os.walk(folder / area):
            where = Path(parent)
            for name in files:
                if name.endswith(".tmp"):  # what a killed process was writing
                    (where / name).unlink()
            rounds = _rounds(files)
            kept = {max((r for r in rounds if r <= limit), default=None) for limit in keep}
            for number in rounds:
                # A newer one than any kept round belongs to a round that never was committed.
                if number not in kept:
                    (where / _file(number)).unlink()
