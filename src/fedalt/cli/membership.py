"""`fedalt join` and `leave`: clients that come late to a run, and clients that go."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet, RunPath
from fedalt.cli.output import hush_libraries, note, show, show_json, warn


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
    """Evaluate clients that join after training: they get the shared part and train their own.

    The table compares their own model, the shared part alone, and local-only training for as
    long. The models of the other clients do not change.
    """
    hush_libraries()
    from fedalt.report.table import describe, run_table, to_json
    from fedalt.runs.membership import join as let_in

    lines = let_in(path, data, epochs=epochs, warn=partial(warn, quiet=quiet))
    if not lines:
        note("no newcomer has test data, so there is no table")
        return
    scores, losses = (run_table(lines, losses=losses) for losses in (False, True))
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
    """Remove a client's last upload from what the server sends, and the client from the run.

    What other clients learnt from it in earlier rounds stays in their adapters. The client's own
    state stays in the folder.
    """
    hush_libraries()
    from fedalt.runs.membership import leave as let_go
    from fedalt.runs.record import is_federation, read_facts

    let_go(path, client)
    if is_federation(read_facts(path)):
        note(f"{client} has left; start `fedalt server` again", quiet=quiet)
    else:
        note(f"{client} has left; `fedalt evaluate {path}` scores the others again", quiet=quiet)
