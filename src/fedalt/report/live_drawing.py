"""Runs that go on, drawn for a terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table as Drawn
from rich.text import Text

from fedalt.report.live import Client, Live
from fedalt.report.table import draw, shown_size

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # of a curve, in characters
_ROWS_AROUND = 16  # lines of a run's frame that are not clients


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
