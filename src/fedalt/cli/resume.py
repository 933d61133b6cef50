"""`fedalt resume` and `evaluate`: go on with a run, or score it once more."""

from typing import Annotated, Literal

import typer

from fedalt.cli.client import Model
from fedalt.cli.flags import AsJson, Quiet, ReportTo, RunPath
from fedalt.cli.output import hush_libraries, note, show_run, warn


def resume(
    path: RunPath,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Let the run end after so many rounds, such as more than it had."),
    ] = None,
    report_to: ReportTo = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a run that was stopped, or make it longer."""
    hush_libraries()
    from fedalt.cli.training import introduce, train
    from fedalt.report.trackers import require_trackers
    from fedalt.runs.folder import open_run
    from fedalt.runs.length import is_finished, set_rounds
    from fedalt.runs.lifecycle import reopen

    if rounds is not None:
        set_rounds(path, rounds)
    if is_finished(path):
        open_run(path).require_whole()
        note(f"{path} is finished: all its rounds are done and tested", quiet=quiet)
        show_run(path, as_json=as_json, quiet=quiet)
        return
    require_trackers(report_to or ())
    prepared = reopen(path)
    introduce(prepared, path, quiet=quiet)
    train(prepared, path, report_to=report_to or (), quiet=quiet)
    show_run(path, as_json=as_json, quiet=quiet)


def evaluate(
    path: Model,
    split: Annotated[Literal["test", "validation"], typer.Option(help="Split to score.")] = "test",
    round_: Annotated[
        int | None,
        typer.Option("--round", help="Use the model after this round instead of the tested one."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score the models of a run again and print the table; nothing is written."""
    hush_libraries()
    from fedalt.flower import client_model as own
    from fedalt.runs.lifecycle import evaluate as score
    from fedalt.runs.lifecycle import reopen
    from fedalt.runs.settings import method_name

    if (config := own.client_at(path)) is not None:
        lines = own.evaluate(config, split, round_)
        name = method_name(config.terms.settings.method)
        show_run(path, lines, split=split, method=name, as_json=as_json, quiet=quiet)
        return
    prepared = reopen(path)
    warn(prepared.warnings, quiet=quiet)
    lines = score(prepared, path, split, round_)
    show_run(path, lines, split=split, as_json=as_json, quiet=quiet)
