"""A running run as its folder shows it: what is new is read."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from fedalt.core.reading import read_bytes
from fedalt.report.table import Table, run_table
from fedalt.runs.record import (
    Length,
    Standing,
    StoreError,
    committed_lines,
    everyone_in,
    meant_by,
    parse_line,
    read_facts,
    read_length,
    read_standing,
    require_committed,
    require_run,
)
from fedalt.runs.standing import PROGRESS, RECORD

Line = Mapping[str, Any]
Stamp = tuple[tuple[int, int], ...]  # nanoseconds and bytes of each file that is read

_FILES = ("run.json", "settings.toml", PROGRESS, RECORD)
_ENDS = ("results.jsonl", "table.json", "tune.jsonl")  # what ends compare, demo and tune
_LATE = 60.0  # seconds that a network may take to show bytes that count
_PACE = 5  # so many rounds tell how long the next ones take


@dataclass(frozen=True)
class Reading:
    """What has been read of a run so far.

    `counted` are the committed lines, the first `offset` bytes of the record, whose SHA-256 is
    `digest`; `ahead` are lines of the round that is going on, which a crash would take back.
    """

    path: Path
    stamp: Stamp = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    length: Length = field(default_factory=lambda: Length(0, test=False))
    standing: Standing = field(default_factory=Standing)
    offset: int = 0
    digest: Any = field(default_factory=sha256)
    counted: tuple[Line, ...] = ()
    ahead: tuple[Line, ...] = ()

    @property
    def lines(self) -> tuple[Line, ...]:
        """Every line, the newest last."""
        return self.counted + self.ahead


@dataclass(frozen=True)
class Client:
    """A client's losses, round by round, and the bytes of its last upload, None before any."""

    name: str
    train: tuple[float, ...]
    validation: tuple[float, ...]
    upload_bytes: int | None


@dataclass(frozen=True)
class Live:
    """A run at one moment.

    `curves` are mean losses by round under names such as "train own"; `trained` counts trainings
    of the round that goes on; `seconds` is a round's length lately, None before the first one;
    `written` is when the record was last written, in seconds since 1970; `table` is there at the
    end, unless nothing was scored.
    """

    path: Path
    method: str
    state: Literal["training", "testing", "finished"]
    rounds_done: int
    rounds: int
    trained: int
    seconds: float | None
    written: float
    curves: Mapping[str, tuple[float, ...]]
    clients: tuple[Client, ...]
    warnings: tuple[str, ...]
    table: Table | None

    @property
    def seconds_left(self) -> float | None:
        """Until the last round is done, if the next rounds take as long as the last ones."""
        return None if self.seconds is None else self.seconds * (self.rounds - self.rounds_done)


def runs_of(path: Path) -> list[Path]:
    """The run that a folder is, or the runs of the comparison that it is. Raises StoreError."""
    if (path / "run.json").exists():
        return [path]
    runs = sorted(file.parent for file in path.glob("*/seed-*/run.json"))
    if not runs:
        raise StoreError(
            f"{path} is neither a run's folder nor that of a comparison with runs{meant_by(path)}"
        )
    return runs


def is_comparison(path: Path, runs: Sequence[Path]) -> bool:
    """Whether the runs lie below the folder."""
    return list(runs) != [path]


def follow(seen: Reading) -> Reading:
    """What can be read now; of the record only bytes that did not count before are read.

    Another round may be committed while this reads: what counts is what progress.json said
    first. A line that is not whole yet is left for the next time. Raises StoreError.
    """
    path, stamp = seen.path, _stamp(seen.path)
    if stamp == seen.stamp:
        return seen
    require_run(path)
    standing = read_standing(path)
    if standing.record_bytes < seen.offset:  # another run has taken this one's place
        seen = Reading(path)
    new, digest = b"", seen.digest.copy()
    if (path / RECORD).exists():
        with (path / RECORD).open("rb") as file:
            file.seek(seen.offset)
            new = file.read()
    committed = _whole(new[: standing.record_bytes - seen.offset])
    digest.update(committed)
    offset = seen.offset + len(committed)
    _require_committed(path, standing, offset, digest.hexdigest())
    vouched = offset == standing.record_bytes  # else lines are checked one by one
    counted = tuple(committed_lines(committed, path / RECORD, json.loads if vouched else None))
    return Reading(
        path=path,
        stamp=stamp,
        facts=read_facts(path),
        length=read_length(path),
        standing=standing,
        offset=offset,
        digest=digest,
        counted=seen.counted + counted,
        ahead=tuple(_readable(_whole(new[len(committed) :]))),
    )


def _require_committed(path: Path, standing: Standing, offset: int, digest: str) -> None:
    """Raise StoreError unless what was read is what counts; on a network, bytes may come late."""
    file = path / RECORD
    if offset == standing.record_bytes and digest != standing.record_sha256:
        require_committed(file, file.read_bytes()[:offset], standing)
        raise StoreError(f"{file} was changed while it was read")
    if offset < standing.record_bytes and time.time() - (path / PROGRESS).stat().st_mtime > _LATE:
        require_committed(file, read_bytes(file) if offset else b"", standing)


def live_of(seen: Reading) -> Live:
    """How the run stands; the table is that of the test data, or of validation without a test."""
    done, length = seen.standing.rounds_done, seen.length
    trained_all = done >= length.rounds
    finished = trained_all and (seen.standing.tested or not length.test)
    split = "test" if length.test else "validation"
    scored = any(line["kind"] == "score" and line["split"] == split for line in seen.lines)
    seconds = [line["seconds"] for line in seen.lines if line["kind"] == "round"][-_PACE:]
    record = seen.path / RECORD
    return Live(
        path=seen.path,
        method=str(seen.facts.get("method", "")),
        state="finished" if finished else "testing" if trained_all else "training",
        rounds_done=done,
        rounds=length.rounds,
        trained=sum(line["kind"] == "train" for line in seen.ahead),
        seconds=fmean(seconds) if seconds else None,
        written=record.stat().st_mtime if record.exists() else 0.0,
        curves=_curves(seen.lines),
        clients=tuple(_clients(seen)),
        warnings=tuple(seen.facts.get("warnings", ())),
        table=run_table(seen.counted, split) if finished and scored else None,
    )


def is_finished(path: Path, runs: Sequence[Live]) -> bool:
    """Whether nothing more will come; a comparison ends with its results."""
    if any(run.state != "finished" for run in runs):
        return False
    if not is_comparison(path, [run.path for run in runs]):
        return True
    ends = [(path / name).stat().st_mtime_ns for name in _ENDS if (path / name).exists()]
    last = max((run.path / "progress.json").stat().st_mtime_ns for run in runs)
    return bool(ends) and max(ends) >= last


def _stamp(path: Path) -> Stamp:
    """When each file was written and how long it is; -1 where there is none."""

    def of(file: Path) -> tuple[int, int]:
        try:
            status = os.stat(file)  # noqa: PTH116 - one call, on a network one question
        except FileNotFoundError:
            return (-1, -1)
        return (status.st_mtime_ns, status.st_size)

    return tuple(of(path / name) for name in _FILES)


def _whole(data: bytes) -> bytes:
    """All but a last line that does not end."""
    return data[: data.rfind(b"\n") + 1]


def _readable(data: bytes) -> Iterable[Line]:
    """The lines up to the first that is none: on a network mount, bytes may come late."""
    for line in data.splitlines():
        try:
            yield parse_line(line.decode())
        except ValueError:
            return


def _curves(lines: Sequence[Line]) -> dict[str, tuple[float, ...]]:
    """Mean losses over the clients, round by round; test scores belong to no round."""
    losses: dict[tuple[str, str], dict[int, list[float]]] = {}
    for line in lines:
        if (kind := _kind(line)) is not None and line["column"] != "shared":
            of_round = losses.setdefault((line["column"], kind), {})
            of_round.setdefault(line["round"], []).append(line["metrics"]["loss"])
    return {
        f"{kind} {column}": tuple(fmean(losses[column, kind][at]) for at in sorted(rounds))
        for (column, kind), rounds in losses.items()
    }


def _clients(seen: Reading) -> Iterable[Client]:
    """Everyone in the run now, sorted."""
    losses: dict[tuple[str, str], list[float]] = {}
    uploads: dict[str, int] = {}
    for line in seen.lines:
        if (kind := _kind(line)) is not None and line["column"] == "own":
            losses.setdefault((line["client"], kind), []).append(line["metrics"]["loss"])
            if kind == "train" and "refused" not in line:
                uploads[line["client"]] = line["upload_bytes"]
    for name in sorted(everyone_in(seen.facts).keys() - set(seen.facts.get("left", ()))):
        train, validation = (tuple(losses.get((name, kind), ())) for kind in _KINDS)
        yield Client(name, train, validation, uploads.get(name))


_KINDS = ("train", "validation")


def _kind(line: Line) -> str | None:
    """What a loss was measured on while the rounds go on; None for a line that has none."""
    if "loss" not in line.get("metrics", ()):  # a federation's clients say what they measured
        return None
    if line["kind"] == "score":
        return "validation" if line["split"] == "validation" else None
    return "train" if line["kind"] == "train" else None
