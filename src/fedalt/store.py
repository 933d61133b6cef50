"""A run's folder: settings, the record of rounds, and states that no crash leaves in pieces.

run.json                    format, versions, data and model fingerprints
settings.toml               the resolved settings
rounds.jsonl                one line per client, evaluation and round
examples.jsonl              a few test examples of each client in full: private, like the data
progress.json               how far the run is; replacing this file commits a round
clients/ID/0007.safetensors a client's state after round 7, and server/ likewise
server/latest/ID/...        each client's last upload, for methods that keep a ledger
local/...                   the same for the local-only yardstick; see states.py
refused.jsonl, quarantine/  uploads that do not count: why, and their bytes
waiting/                    uploads of a round that has to see all before it judges one
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedalt.codec import atomic_write
from fedalt.engine.course import Line, Progress
from fedalt.files import AtOnce, Writer
from fedalt.record import (
    FORMAT,
    Standing,
    StoreError,
    read_facts,
    read_standing,
    require_run,
)
from fedalt.states import FileStates, prune

__all__ = [
    "RunFolder",
    "StoreError",
    "create",
    "kept_rounds",
    "locked",
    "open_run",
    "require_unused",
]


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


def _compact(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _is_empty(folder: Path) -> bool:
    return all(entry.name == ".lock" for entry in folder.iterdir())
