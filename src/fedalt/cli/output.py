"""What the commands print: results on stdout, everything else on stderr."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedalt.core.foreign import shown, shown_lines, shown_message

if TYPE_CHECKING:
    from rich.console import Console

    from fedalt.engine.schedule import Line
    from fedalt.report.table import Table
    from fedalt.runs.harness import Measured

WIDTH = 120  # where there is no terminal to ask
LONGEST_NOTE = 2000  # characters: some name every client


def hush_libraries() -> None:
    """Keep the libraries' own progress bars and hints out of our output; errors still come."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def note(text: str, *, quiet: bool = False) -> None:
    """A sentence for the reader, on stderr; what others have put into it is cleaned."""
    if not quiet:
        print(shown_message(text), file=sys.stderr, flush=True)


def warn(sentences: Iterable[str], *, quiet: bool = False) -> None:
    """What the user should know, one sentence per line."""
    for sentence in sentences:
        note(f"note: {shown(sentence, LONGEST_NOTE)}", quiet=quiet)


def console(*, stderr: bool = False) -> "Console":
    """A console as wide as the terminal or as COLUMNS says, or wide enough where neither is there.

    It takes no text for markup or emoji: labels, names and answers may have brackets and colons.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def tell(text: str) -> None:
    """A result in one or several lines, on stdout; what others have put into it is cleaned."""
    typer.echo(shown_lines(text, sys.maxsize))


def show(*tables: tuple["Table", str]) -> None:
    """Tables with their titles, on stdout."""
    from fedalt.report.table import draw

    out = console()
    for table, title in tables:
        out.print(draw(table, title))


def show_json(value: Mapping[str, Any]) -> None:
    """A result for machines, on stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def free_folder(wanted: Path, is_ours: Callable[[Path], bool] = lambda _: False) -> Path:
    """The folder itself, or, where it exists, the first of name-2, name-3, ... that does not.

    One that exists and `is_ours` will do.
    """
    number, folder = 1, wanted
    while folder.exists() and not is_ours(folder):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def show_run(
    path: Path,
    lines: "Sequence[Line] | None" = None,
    *,
    split: str | None = None,
    method: str | None = None,
    measured: "Sequence[Measured]" = (),
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Tables of a run's scores and losses, as a drawing or as JSON.

    Lines, method and split are the run's own where none are given: a run that is not tested shows
    its validation. Of its own lines it is also said if it has learnt nothing. `measured` by
    lm-evaluation-harness stands below.
    """
    from fedalt.report.learning import nothing_learnt
    from fedalt.report.table import describe, run_table, to_json
    from fedalt.runs.folder import open_run
    from fedalt.runs.record import read_length

    split = split or ("test" if read_length(path).test else "validation")
    of_itself = lines is None
    if method is None:
        method = open_run(path).facts().get("method")
    about: dict[str, Any] = {"run": str(path), "method": method, "split": split}
    if measured and as_json:
        about["lm_eval"] = [asdict(number) for number in measured]
    lines = open_run(path).lines() if lines is None else lines
    if not any(line["kind"] == "score" and line["split"] == split for line in lines):
        note(f"no client has {split} data, so there is no table")
        if as_json:
            show_json(about)
        else:
            _show_measured(measured)
        return
    scores, losses = (run_table(lines, split, losses=of_losses) for of_losses in (False, True))
    learnt = nothing_learnt(path) if of_itself else ""
    if as_json:
        warn([learnt] if learnt else [], quiet=quiet)
        tables = {"scores": to_json(scores), "losses": to_json(losses)}
        show_json({**about, **tables})
        return
    of_losses = (losses, "mean loss of an answer's token, nats")
    show((scores, f"{path}, {split} data"), *([] if scores.of_losses else [of_losses]))
    for sentence in describe(lines, split):
        note(sentence, quiet=quiet)
    _show_measured(measured)
    warn([learnt] if learnt else [], quiet=quiet)


def _show_measured(measured: "Sequence[Measured]") -> None:
    from fedalt.report.sheet import Sheet

    rows = [
        [each.task, each.metric, f"{each.value:.4g}", "" if not each.error else f"{each.error:.2g}"]
        for each in measured
    ]
    if rows:
        heads = ["task", "metric", "value", "standard error"]
        console().print(Sheet(heads, rows, "lm-evaluation-harness", left=(0, 1)))
