"""`fedalt privacy audit`: plant texts, train, and see what an attack finds of them."""

import secrets
from dataclasses import asdict
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet
from fedalt.cli.output import console, hush_libraries, note, show_json
from fedalt.report.docstrings import docstring

if TYPE_CHECKING:
    from fedalt.runs.audit import Audit

app = typer.Typer(help="Check what differential privacy promises.", suggest_commands=False)


@app.callback()
def _group() -> None:
    """Privacy."""


def audit(
    epsilon: Annotated[
        float, typer.Option("--epsilon", help="The budget that the run with noise claims.")
    ] = 4.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Repeats an audit, noise included; by default all is drawn."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Plant texts in a client's data, train without noise and with, and attack both runs.

    A fair coin decides of each text whether it is planted; the attack guesses the coins by how far
    losses fall. Its lower bound of epsilon stands beside the claim. Fails if a bound is above its
    claim, or if nothing is found without noise: then the attack is too weak to mean anything.
    """
    if not 0 < epsilon < inf:
        raise typer.BadParameter(f"--epsilon is {epsilon:g}, but a budget is above 0 and finite")
    hush_libraries()
    from fedalt.cli.progress import watching
    from fedalt.engine.accounting import require_accounting
    from fedalt.runs import audit as audits

    require_accounting()
    drawn = secrets.randbits(31) if seed is None else seed
    audits_of: dict[str, Audit] = {}
    for name, budget in (("without noise", None), (f"epsilon {epsilon:g}", epsilon)):
        note(f"{name}: {audits.CANARIES} canaries, a fair coin for each", quiet=quiet)
        audits_of[name] = audits.audit(
            budget, drawn, partial(watching, quiet=quiet), repeatable=seed is not None
        )
    found = audits_of["without noise"].guesses.bound > 0
    kept = all(each.kept for each in audits_of.values())
    _show(audits_of, as_json=as_json, passed=found and kept)
    if not found:
        note("the attack finds nothing even without noise, so it says nothing of the run with it")
    if not kept:
        note("a lower bound is above its claim: a fault, save for one audit in twenty")
    if not (found and kept):
        raise typer.Exit(1)


def _show(audits_of: "dict[str, Audit]", *, as_json: bool, passed: bool) -> None:
    if as_json:
        runs = {
            name: {"claimed": None if each.claimed == inf else each.claimed, **asdict(each.guesses)}
            for name, each in audits_of.items()
        }
        show_json({"runs": runs, "passed": passed})
        return
    from fedalt.report.sheet import Sheet
    from fedalt.runs.audit import DELTA

    rows = [
        [
            name,
            "infinite" if each.claimed == inf else f"{each.claimed:.2f}",
            f"{each.guesses.right} of {each.guesses.made}",
            f"{each.guesses.bound:.2f}",
        ]
        for name, each in audits_of.items()
    ]
    heads = ("run", "epsilon claimed", "right guesses", "epsilon at least")
    console().print(Sheet(heads, rows, f"privacy audit, delta {DELTA:g}, confidence 95 %"))


app.command(help=docstring(audit))(audit)
