"""`fedalt watch`: a run, or a comparison, as it goes on, from its folder alone."""

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalt.cli.output import console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedalt.report.live import Live, Reading

SECOND = 1.0


def watch(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run or of a comparison.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Follow a run: rounds, losses, uploads and the time left.

    Only the folder is read, so it may be on another machine. Ends with the run, or with q. Without
    a terminal one frame is printed, as with --once.
    """
    from rich.live import Live as Screen

    from fedalt.report.live import is_finished

    out = console()
    readings, runs = _read(path, {})
    if not once and out.is_terminal:
        with _keys() as pressed, Screen(console=out, screen=True, auto_refresh=False) as screen:
            hint = "q ends"
            try:
                while not is_finished(path, runs):
                    screen.update(_frame(path, runs, out.height, hint), refresh=True)
                    if pressed(SECOND):
                        break
                    try:
                        readings, runs = _read(path, readings)
                        hint = "q ends"
                    except OSError as error:  # a network mount that is away for a moment
                        hint = f"{error.filename}: {error.strerror}; trying again; q ends"
            except KeyboardInterrupt:
                pass
    out.print(_frame(path, runs, sys.maxsize))


def _read(path: Path, before: "Mapping[Path, Reading]") -> "tuple[dict[Path, Reading], list[Live]]":
    """What has been read of each run that is there, and how the runs stand."""
    from fedalt.report.live import Reading, follow, live_of, runs_of

    now = {run: follow(before.get(run, Reading(run))) for run in runs_of(path)}
    return now, [live_of(reading) for reading in now.values()]


def _frame(path: Path, runs: "Sequence[Live]", rows: int, hint: str = "") -> "RenderableType":
    """A run or a comparison as it stands, and what can be done."""
    from rich.console import Group
    from rich.text import Text

    from fedalt.report.live import is_comparison
    from fedalt.report.live_drawing import draw_comparison, draw_run

    if is_comparison(path, [run.path for run in runs]):
        drawn = draw_comparison(path, runs)
    else:
        drawn = draw_run(runs[0], rows=rows, now=time.time())
    return Group(drawn, Text(hint, style="dim")) if hint else drawn


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Whether q was pressed within so many seconds; without a keyboard, only the time passes.

    So it does on Windows, whose terminals are others: there Ctrl-C ends it.
    """
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield _wait
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)  # a key is read when it is pressed; Ctrl-C still interrupts
        yield _pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _pressed(seconds: float) -> bool:
    """Whether q comes within so many seconds; other keys are taken and forgotten."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            keys = os.read(sys.stdin.fileno(), 64)
            if not keys or b"q" in keys.lower():  # none: the terminal is gone
                return True
    return False
