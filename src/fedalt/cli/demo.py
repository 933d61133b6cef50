"""`fedalt demo`: eight generated tasks, three ways to train, one table."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedalt.cli.flags import AsJson, Quiet
from fedalt.cli.output import hush_libraries, note, show, show_json

if TYPE_CHECKING:
    from fedalt.report.table import Table
    from fedalt.settings import Settings

PLAN, TABLE = "demo.json", "table.json"  # what was asked for; there when all is done
METHODS = ("fedalt", "fedit")  # local only is the yardstick of the first
ROUNDS = 18
DATA_SEED = 1  # the settings were found on suites of other seeds


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where to put data, runs and tables.")] = Path(
        "runs/demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = ROUNDS,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare FedALT with FedIT and with training alone on eight generated tasks.

    The tasks and the base model are built in: nothing is downloaded. A demo that was stopped goes
    on; one that is finished stays, and the next takes a folder of its own.
    """
    hush_libraries()
    from fedalt.report.table import joined, scores_of, to_csv, to_json, to_markdown, verdict
    from fedalt.store import open_run

    plan = {"seeds": seeds, "rounds": rounds}
    folder = _folder(out, plan)
    if folder != out:
        note(f"{out} stays as it is; this demo goes to {folder}", quiet=quiet)
    data = _data(folder, plan)
    runs = {
        (method, seed): (folder if seeds == 1 else folder / f"seed-{seed}") / method
        for seed in range(seeds)
        for method in METHODS
    }
    base = None
    try:
        for (method, seed), path in runs.items():
            base = _run(path, _settings(data, method, seed, rounds), base, quiet=quiet)
    except typer.Exit:
        again = f"fedalt demo --out {out} --seeds {seeds} --rounds {rounds}"
        note(f"`{again}` goes on with all of the demo", quiet=quiet)
        raise
    lines = {key: open_run(path).lines() for key, path in runs.items()}
    columns = {
        name: [scores_of(lines[method, seed], column) for seed in range(seeds)]
        for name, method, column in (
            ("FedALT", "fedalt", "own"),
            ("FedIT", "fedit", "own"),
            ("local", "fedalt", "local"),
        )
    }
    scores, losses = (joined(columns, "local", losses=each) for each in (False, True))
    (folder / "table.md").write_text(f"{to_markdown(scores)}\n{to_markdown(losses)}")
    (folder / "table.csv").write_text(to_csv(scores))
    verdicts = [f"mean: {verdict(scores, 'FedALT', other)}" for other in ("FedIT", "local")]
    result: dict[str, Any] = {
        "folder": str(folder),
        "runs": [str(path) for path in runs.values()],
        "scores": to_json(scores),
        "losses": to_json(losses),
        "verdicts": verdicts,
    }
    (folder / TABLE).write_text(json.dumps(result, indent=2))
    if as_json:
        show_json(result)
        return
    show((scores, "test scores of each client's own model"), (losses, "answer loss, nats"))
    for sentence in verdicts:
        typer.echo(sentence)
    _point_to(folder, runs[METHODS[0], 0], scores, quiet=quiet)


def _folder(out: Path, plan: dict[str, int]) -> Path:
    """The folder asked for or, where it holds anything else, the next name that is free."""
    number, folder = 1, out
    while folder.exists() and not _is_unfinished(folder, plan):
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    return folder


def _is_unfinished(folder: Path, plan: dict[str, int]) -> bool:
    """Whether a demo of this plan was stopped here, or nothing has happened yet."""
    if not folder.is_dir() or (folder / TABLE).exists():
        return False
    if not (folder / PLAN).exists():
        return not any(folder.iterdir())
    try:
        return bool(json.loads((folder / PLAN).read_text()) == plan)
    except ValueError:
        return False


def _data(folder: Path, plan: dict[str, int]) -> Path:
    """The generated client data; the plan is written last, so that it vouches for them."""
    from fedalt.data.suite import write_suite
    from fedalt.files import atomic_write

    data = folder / "data"
    if not (folder / PLAN).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_suite(data, seed=DATA_SEED)
        atomic_write(folder / PLAN, json.dumps(plan).encode())
    return data


def _settings(data: Path, method: str, seed: int, rounds: int) -> "Settings":
    from fedalt.settings import settings_of

    table = {
        "seed": seed,
        "yardstick": method == METHODS[0],
        "data": {"path": str(data.absolute())},
        "method": {"name": method},
        # The base model is a thousandth of what the published defaults are for.
        "model": {"targets": "all-linear"},
        "training": {"lr": 2e-3},
        # The same round for everyone: on these data the loss chooses rounds with few right answers.
        "rounds": {"rounds": rounds, "select": "last", "evaluate_every": 6},
        "scoring": {"max_new_tokens": 8},
    }
    return settings_of(table, "the demo")


def _run(path: Path, settings: "Settings", base: Any, *, quiet: bool) -> Any:
    """Bring one run to its end, whether it is new, was stopped, or is there; the base model."""
    from fedalt.cli.training import introduce, train
    from fedalt.prepare import prepare
    from fedalt.runs import is_finished, new_run

    if (path / "run.json").exists() and is_finished(path):
        return base
    prepared = prepare(settings, base=base)
    introduce(prepared, path, quiet=quiet)
    if not (path / "run.json").exists():
        new_run(prepared, path)
    train(prepared, path, quiet=quiet)
    return prepared.parts.base


def _point_to(folder: Path, run: Path, scores: "Table", *, quiet: bool) -> None:
    client = scores.clients[0].name
    note(f"tables, runs and data lie in {folder}", quiet=quiet)
    note(f"try: fedalt generate {run} --client {client}", quiet=quiet)
    note(f"     fedalt export {run} --client {client} --out my-model", quiet=quiet)
    note("     fedalt run --data YOUR_FOLDER --model YOUR_MODEL", quiet=quiet)
