"""A running run as its folder shows it: what is new is read, and drawn for a terminal."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table as Drawn
from rich.text import Text

from fedalt.record import (
    Length,
    Standing,
    StoreError,
    read_facts,
    read_length,
    read_standing,
    require_run,
)
from fedalt.report.table import Table, draw, run_table, shown_size

Line = Mapping[str, Any]
Stamp = tuple[tuple[int, int], ...]  # nanoseconds and bytes of each file that is read

RECORD = "rounds.jsonl"
_FILES = ("run.json", "settings.toml", "progress.json", RECORD)
_ENDS = ("results.jsonl", "table.json", "tune.jsonl")  # what ends compare, demo and tune
_BARS = "▁▂▃▄▅▆▇█"
_PACE = 5  # so many rounds tell how long the next ones take
_WIDTH = 24  # of a curve, in characters
_ROWS_AROUND = 16  # lines of a run's frame that are not clients


@dataclass(frozen=True)
class Reading:
    """What has been read of a run so far.

    `counted` are the committed lines, the first `offset` bytes of the record; `ahead` are lines
    of the round that is going on, which a crash would take back.
    """

    path: Path
    stamp: Stamp = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    length: Length = field(default_factory=lambda: Length(0, test=False))
    standing: Standing = field(default_factory=Standing)
    offset: int = 0
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
    found = sorted(file.parent for file in path.glob("*/seed-*/run.json"))
    if not found:
        raise StoreError(f"{path} is neither a run's folder nor that of a comparison with runs")
    return found


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
    new = b""
    if (path / RECORD).exists():
        with (path / RECORD).open("rb") as file:
            file.seek(seen.offset)
            new = file.read()
    committed = _whole(new[: standing.record_bytes - seen.offset])
    try:
        counted = tuple(json.loads(line) for line in committed.splitlines())
    except ValueError as error:
        raise StoreError(f"{path / RECORD} is damaged: {error}") from error
    return Reading(
        path=path,
        stamp=stamp,
        facts=read_facts(path),
        length=read_length(path),
        standing=standing,
        offset=seen.offset + len(committed),
        counted=seen.counted + counted,
        ahead=tuple(_readable(_whole(new[len(committed) :]))),
    )


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


def draw_run(run: Live, *, rows: int, now: float) -> RenderableType:
    """A run for a terminal of so many rows; `now` is in seconds since 1970."""
    parts: list[RenderableType] = [
        Text(f"{run.path}  {run.method}", style="bold"),
        _bar(run),
        Text(_state(run, now)),
        _drawn_curves(run.curves),
        _drawn_clients(run.clients, max(3, rows - _ROWS_AROUND)),
        *(Text(f"note: {warning}", style="yellow") for warning in run.warnings[-3:]),
    ]
    if run.table is not None:
        parts.append(draw(run.table, "scores"))
    return Group(*parts)


def draw_comparison(path: Path, runs: Sequence[Live]) -> RenderableType:
    """A comparison for a terminal: a line for each of its runs that has begun."""
    drawn = Drawn(box=SIMPLE_HEAD)
    drawn.add_column("run", overflow="fold")
    for head in ("rounds", "train loss", "validation loss"):
        drawn.add_column(head, justify="right", no_wrap=True)
    drawn.add_column("curve", no_wrap=True)
    drawn.add_column("left", justify="right", no_wrap=True)
    for run in runs:
        validation = run.curves.get("validation own", ())
        drawn.add_row(
            str(run.path.relative_to(path)),
            f"{run.rounds_done}/{run.rounds}",
            _last(run.curves.get("train own", ())),
            _last(validation),
            sparkline(validation or run.curves.get("train own", ()), _WIDTH),
            _left(run) if run.state == "training" else run.state,
        )
    finished = sum(run.state == "finished" for run in runs)
    title = f"{path}  {len(runs)} runs begun, {finished} finished"
    return Group(Text(title, style="bold"), drawn)


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in one line of at most `width` characters, each the mean of equally many values."""
    if not values:
        return ""
    size = min(width, len(values))
    edges = [at * len(values) // size for at in range(size + 1)]
    means = [fmean(values[a:b]) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)


def shown_time(seconds: float) -> str:
    """A length of time in one word and its unit."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _stamp(path: Path) -> Stamp:
    """When each file was written and how long it is; -1 where there is none."""

    def of(file: Path) -> tuple[int, int]:
        try:
            found = os.stat(file)  # noqa: PTH116 - one call, on a network one question
        except FileNotFoundError:
            return (-1, -1)
        return (found.st_mtime_ns, found.st_size)

    return tuple(of(path / name) for name in _FILES)


def _whole(data: bytes) -> bytes:
    """All but a last line that does not end."""
    return data[: data.rfind(b"\n") + 1]


def _readable(data: bytes) -> Iterable[Line]:
    """The lines up to the first that is none: on a network mount, bytes may come late."""
    for line in data.splitlines():
        try:
            yield json.loads(line)
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
    everyone = {**seen.facts.get("clients", {}), **seen.facts.get("joined", {})}
    losses: dict[tuple[str, str], list[float]] = {}
    uploads: dict[str, int] = {}
    for line in seen.lines:
        if (kind := _kind(line)) is not None and line["column"] == "own":
            losses.setdefault((line["client"], kind), []).append(line["metrics"]["loss"])
            if kind == "train":
                uploads[line["client"]] = line["upload_bytes"]
    for name in sorted(everyone.keys() - set(seen.facts.get("left", ()))):
        train, validation = (tuple(losses.get((name, kind), ())) for kind in _KINDS)
        yield Client(name, train, validation, uploads.get(name))


_KINDS = ("train", "validation")


def _kind(line: Line) -> str | None:
    """What a loss was measured on while the rounds go on."""
    if line["kind"] == "score":
        return "validation" if line["split"] == "validation" else None
    return "train" if line["kind"] == "train" else None


def _bar(run: Live) -> RenderableType:
    grid = Drawn.grid(padding=(0, 1))
    bar = ProgressBar(total=run.rounds, completed=run.rounds_done, width=40)
    grid.add_row(bar, f"{run.rounds_done} of {run.rounds} rounds done")
    return grid


def _state(run: Live, now: float) -> str:
    if run.state == "finished":
        return "finished"
    doing: str = run.state
    if run.state == "training":
        doing = f"round {run.rounds_done} of 0 to {run.rounds - 1}, {run.trained} trainings done"
    pace = "" if run.seconds is None else f"; {shown_time(run.seconds)} a round, {_left(run)} left"
    wrote = f"; last written {shown_time(max(0.0, now - run.written))} ago" if run.written else ""
    return doing + (pace if run.state == "training" else "") + wrote


def _left(run: Live) -> str:
    return "–" if run.seconds_left is None else shown_time(run.seconds_left)


def _drawn_curves(curves: Mapping[str, tuple[float, ...]]) -> RenderableType:
    grid = Drawn.grid(padding=(0, 2))
    for name, values in curves.items():
        grid.add_row(f"{name} loss", sparkline(values, 2 * _WIDTH), _span(values))
    return grid


def _drawn_clients(clients: Sequence[Client], most: int) -> RenderableType:
    """The clients; where they are too many, those whose loss is highest."""
    drawn = Drawn(box=SIMPLE_HEAD)
    drawn.add_column("client", overflow="fold")
    for head in ("train loss", "validation loss"):
        drawn.add_column(head, justify="right", no_wrap=True)
    drawn.add_column("curve", no_wrap=True)
    drawn.add_column("upload", justify="right", no_wrap=True)
    shown = clients
    if len(clients) > most:
        shown = sorted(clients, key=lambda each: -(_best_known(each) or 0.0))[:most]
    for each in shown:
        drawn.add_row(
            each.name,
            _last(each.train),
            _last(each.validation),
            sparkline(each.validation or each.train, _WIDTH),
            "–" if each.upload_bytes is None else shown_size(each.upload_bytes),
        )
    if len(shown) < len(clients):
        more = f"{len(clients) - len(shown)} more clients, all with lower losses"
        return Group(drawn, Text(f"  {more}"))
    return drawn


def _best_known(client: Client) -> float | None:
    """The loss that a client is ranked by."""
    known = client.validation or client.train
    return known[-1] if known else None


def _last(values: Sequence[float]) -> str:
    return f"{values[-1]:.3f}" if values else "–"


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} → {values[-1]:.3f}"
