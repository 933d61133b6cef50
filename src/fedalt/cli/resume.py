"""`fedalt resume` and `evaluate`: go on with a run, or score it once more."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedalt.cli.client import AsColumn, ClientId, Model, Round
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
    from fedalt.runs.length import is_finished, with_rounds
    from fedalt.runs.lifecycle import reopen

    with with_rounds(path, rounds):
        if is_finished(path):
            if report_to:
                raise typer.BadParameter(f"{path} is finished; `fedalt track` sends its numbers")
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
    round_: Round = None,
    client: ClientId = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Also run these tasks of lm-evaluation-harness, or task files, separated by "
            "commas, on the model of --client.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of task files for --lm-eval.")
    ] = None,
    column: AsColumn = "own",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score the models of a run again, or of one client, and print the table; nothing is written.

    --column says which model of the client --lm-eval is about; the table has all of them.
    """
    hush_libraries()
    from fedalt.flower import client_model as own
    from fedalt.runs.folder import open_run
    from fedalt.runs.harness import load_tasks, measure, require_askable
    from fedalt.runs.lifecycle import evaluate as score
    from fedalt.runs.lifecycle import reopen, require_client
    from fedalt.runs.settings import method_name

    if lm_eval is None and (include_path is not None or column != "own"):
        raise typer.BadParameter("--include-path and --column say something of --lm-eval")
    tasks = {} if lm_eval is None else load_tasks(lm_eval.split(","), include_path)
    base = name = asked = None
    if (config := own.client_at(path)) is not None:
        own.require_owner(config, client)
    else:
        if tasks:
            client = client or own.only_client(path)
        if client is not None:
            require_client(open_run(path), client)
        prepared = reopen(path)
        base = prepared.parts.base
        warn(prepared.warnings, quiet=quiet)
    if tasks:  # what cannot be asked is told before anything is scored
        asked = own.served(path, client, column, round_, base)
        require_askable(asked)
        base = asked.parts.base
    if config is not None:
        lines = own.evaluate(config, split, round_, base)
        name = method_name(config.terms.settings.method)
    else:
        lines = score(prepared, path, split, round_, only=client)
    measured = [] if asked is None else measure(asked, tasks)
    show_run(path, lines, split=split, method=name, measured=measured, as_json=as_json, quiet=quiet)
