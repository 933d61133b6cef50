"""Runs that go on, drawn for a terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.filesize import decimal
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.text import Text

from fedalt.core.foreign import shown
from fedalt.report.live import Client, Live
from fedalt.report.sheet import Sheet
from fedalt.report.table import draw

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # of a curve, in characters
_ROWS_AROUND = 16  # lines of a run's frame that are not clients


def draw_run(run: Live, *, rows: int, now: float) -> RenderableType:
    """A run for a terminal of so many rows; `now` is in seconds since 1970."""
    parts: list[RenderableType] = [
        _text(f"{run.path}  {run.method}", "bold"),
        _bar(run),
        _text(_state(run, now)),
        _drawn_curves(run.curves),
        _drawn_clients(run.clients, max(3, rows - _ROWS_AROUND)),
        *(_text(f"note: {warning}", "yellow") for warning in run.warnings[-3:]),
    ]
    if run.table is not None:
        parts.append(draw(run.table, "scores"))
    return Group(*parts)


def draw_comparison(path: Path, runs: Sequence[Live]) -> RenderableType:
    """A comparison for a terminal: a line for each of its runs that has begun."""
    rows = []
    for run in runs:
        train, validation = (run.curves.get(f"{of} own", ()) for of in ("train", "validation"))
        rows.append(
            [
                str(run.path.relative_to(path)),
                f"{run.rounds_done}/{run.rounds}",
                _last(train),
                _last(validation),
                sparkline(validation or train, _WIDTH),
                _left(run) if run.state == "training" else run.state,
            ]
        )
    finished = sum(run.state == "finished" for run in runs)
    title = f"{path}  {len(runs)} runs begun, {finished} finished"
    heads = ("run", "rounds", "train loss", "validation loss", "curve", "left")
    return Group(_text(title, "bold"), Sheet(heads, rows, left=(0, 4)))


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


def _text(text: str, style: str = "") -> Text:
    """A line of a frame, which folds where it is too long."""
    return Text(shown(text), style=style, overflow="fold")


def _bar(run: Live) -> RenderableType:
    # As wide as there is room, at most so many columns.
    bar = Constrain(Padding(ProgressBar(total=run.rounds, completed=run.rounds_done), 0), 40)
    return Group(bar, Text(f"{run.rounds_done} of {run.rounds} rounds done"))


def _state(run: Live, now: float) -> str:
    if run.state == "finished":
        return "finished"
    doing: str = run.state
    if run.state == "training":
        now_at = f"round {run.rounds_done + 1}/{run.rounds}"
        doing = f"{now_at}, {run.trained} {'training' if run.trained == 1 else 'trainings'} done"
    pace = "" if run.seconds is None else f"; {shown_time(run.seconds)} a round, {_left(run)} left"
    wrote = f"; last written {shown_time(max(0.0, now - run.written))} ago" if run.written else ""
    return doing + (pace if run.state == "training" else "") + wrote


def _left(run: Live) -> str:
    return "–" if run.seconds_left is None else shown_time(run.seconds_left)


def _drawn_curves(curves: Mapping[str, tuple[float, ...]]) -> RenderableType:
    rows = [
        [f"{name} loss", sparkline(values, 2 * _WIDTH), f"{values[0]:.3f} → {values[-1]:.3f}"]
        for name, values in curves.items()
    ]
    return Sheet(("", "", ""), rows, left=(0, 1, 2))


def _drawn_clients(clients: Sequence[Client], most: int) -> RenderableType:
    """The clients; where they are too many, those whose loss is highest."""
    chosen = clients
    if len(clients) > most:
        chosen = sorted(clients, key=lambda client: -(_best_known(client) or 0.0))[:most]
    rows = [
        [
            client.name,
            _last(client.train),
            _last(client.validation),
            sparkline(client.validation or client.train, _WIDTH),
            "–" if client.upload_bytes is None else decimal(client.upload_bytes),
        ]
        for client in chosen
    ]
    heads = ("client", "train loss", "validation loss", "curve", "upload")
    drawn = Sheet(heads, rows, left=(0, 3))
    if len(chosen) < len(clients):
        known = all(_best_known(client) is not None for client in clients)
        losses = "all with lower losses" if known else "with lower losses or none yet"
        more = f"{len(clients) - len(chosen)} more clients, {losses}"
        return Group(drawn, Text(f"  {more}"))
    return drawn


def _best_known(client: Client) -> float | None:
    """The loss that a client is ranked by."""
    known = client.validation or client.train
    return known[-1] if known else None


def _last(values: Sequence[float]) -> str:
    return f"{values[-1]:.3f}" if values else "–"
