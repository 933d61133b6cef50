"""`fedalt join` and `leave`: clients that come late to a run, and clients that go."""

from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet, RunPath
from fedalt.cli.output import hush_libraries, note, show, show_json


def join(
    path: RunPath,
    data: Annotated[Path, typer.Option("--data", help="The newcomers' data, as of a run.")],
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over their data; without it, the run's local epochs."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give clients that were not in training what others have learnt, and train their own part.

    The table says what joining late is worth: their own model, the shared part alone, and
    training alone for as long. No one else's model changes.
    """
    hush_libraries()
    from fedalt.report.table import describe, run_table, to_json
    from fedalt.runs.membership import join as let_in

    lines = let_in(path, data, epochs=epochs)
    if not lines:
        note("no newcomer has test data, so there is no table")
        return
    scores, losses = (run_table(lines, losses=each) for each in (False, True))
    if as_json:
        show_json({"run": str(path), "scores": to_json(scores), "losses": to_json(losses)})
        return
    of_losses = (losses, "mean loss of an answer's token, nats")
    show((scores, f"joined {path}"), *([] if scores.of_losses else [of_losses]))
    note(describe(lines)[0], quiet=quiet)
    first = scores.clients[0].name
    note(f"`fedalt generate {path} --client {first}` asks a newcomer's model", quiet=quiet)


def leave(
    path: RunPath,
    client: Annotated[str, typer.Option("--client", metavar="ID", help="Who leaves.")],
    quiet: Quiet = False,
) -> None:
    """Subtract a departed client from what the others receive.

    Afterwards the run is as if the client's last upload had never come; what others have learnt
    from it in earlier rounds stays in their own adapters. The client's own state stays too.
    """
    hush_libraries()
    from fedalt.runs.membership import leave as let_go
    from fedalt.runs.record import is_federation, read_facts

    let_go(path, client)
    if is_federation(read_facts(path)):
        note(f"{client} has left; start `fedalt server` again", quiet=quiet)
    else:
        note(f"{client} has left; `fedalt evaluate {path}` scores the others again", quiet=quiet)
