"""`fedalt demo`: eight generated tasks, three ways to train, one table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedalt.cli.flags import AsJson, Quiet
from fedalt.cli.output import free_folder, hush_libraries, note, show, show_json

if TYPE_CHECKING:
    from fedalt.report.table import Table

PLAN, TABLE = "demo.json", "table.json"  # what was asked for; there when all is done
PAGE = "report.html"
METHODS = {"fedalt": "FedALT", "fedit": "FedIT", "local": "local"}
ROUNDS = 10
DATA_SEED = 1  # the settings were found on suites of other seeds


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for data, runs and tables.")] = Path(
        "runs/demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = ROUNDS,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare FedALT with FedIT and with training alone on eight generated tasks.

    The tasks and the base model are built in: nothing is downloaded. A demo that was stopped goes
    on; one that is finished stays, and the next takes a folder of its own.
    """
    hush_libraries()
    from fedalt.cli.jobs import run_jobs
    from fedalt.core.files import atomic_write
    from fedalt.report.cells import collect
    from fedalt.report.comparison import write_results
    from fedalt.report.table import joined, to_json, to_markdown, verdict
    from fedalt.runs.compare import jobs_of, read_comparison

    plan = {"seeds": seeds, "rounds": rounds}
    folder = free_folder(out, lambda place: _is_unfinished(place, plan))
    if folder != out:
        note(f"{out} stays as it is; this demo goes to {folder}", quiet=quiet)
    entries, each_seed = read_comparison(_prepare(folder, plan))
    runs = jobs_of(entries, each_seed, folder)
    note(f"eight clients, {rounds} rounds, data and runs in {folder}", quiet=quiet)
    try:
        if run_jobs(runs, None, quiet=quiet):
            raise typer.Exit(1)
    except typer.Exit:
        again = f"fedalt demo --out {out} --seeds {seeds} --rounds {rounds}"
        note(f"`{again}` goes on with all of the demo", quiet=quiet)
        raise
    results = collect(entries, each_seed, runs)
    write_results(folder, results)
    columns = {name: results.scores[method] for method, name in METHODS.items()}
    scores, losses = joined(columns, "local"), joined(columns, "local", metric="loss")
    # By client, as it is shown, instead of a comparison's table by method.
    atomic_write(folder / "table.md", f"{to_markdown(scores)}\n{to_markdown(losses)}".encode())
    pages = _write_pages(folder, runs[0].path)
    verdicts = [f"mean: {verdict(scores, 'FedALT', other)}" for other in ("FedIT", "local")]
    result: dict[str, Any] = {
        "folder": str(folder),
        "runs": [str(run.path) for run in runs],
        "reports": [str(page) for page in pages],
        "scores": to_json(scores),
        "losses": to_json(losses),
        "verdicts": verdicts,
    }
    atomic_write(folder / TABLE, json.dumps(result, indent=2).encode())
    if as_json:
        show_json(result)
        return
    show((scores, "test scores of each client's own model"), (losses, "answer loss, nats"))
    for sentence in verdicts:
        typer.echo(sentence)
    _point_to(folder, runs[0].path, scores, pages, quiet=quiet)


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


def _prepare(folder: Path, plan: dict[str, int]) -> Path:
    """The demo's file of methods, beside the generated client data.

    The plan is written last, so that it vouches for both.
    """
    from fedalt.core.files import atomic_write, make_private_folder
    from fedalt.data.suite import write_suite
    from fedalt.runs.tune import write_toml

    file = folder / "methods.toml"
    if not (folder / PLAN).exists():
        make_private_folder(folder)
        write_suite(folder / "data", seed=DATA_SEED)
        write_toml(file, _comparison(plan))
        atomic_write(folder / PLAN, json.dumps(plan).encode())
    return file


def _comparison(plan: dict[str, int]) -> dict[str, Any]:
    """What `fedalt compare` would be given."""
    rounds = plan["rounds"]
    # A base model a thousandth as large as the published defaults are for: more sites, and updates
    # that move B far and A little, so that clients' adapters stay alike enough to be averaged.
    return {
        "seeds": list(range(plan["seeds"])),
        "data": {"path": "data"},
        "model": {"name": "tiny", "targets": "all-linear"},
        "training": {"lr": 5e-4},
        # The same round for everyone, and no other is looked at.
        "rounds": {"rounds": rounds, "select": "last", "evaluate_every": rounds},
        "scoring": {"max_new_tokens": 8},
        "methods": [{"name": name, "alpha": 128.0} for name in METHODS],
    }


def _write_pages(folder: Path, run: Path) -> list[Path]:
    """The pages of the comparison and of a run; none where what draws them is not installed."""
    from fedalt.report.page import missing_for_report, write_page

    if missing_for_report():
        return []
    from fedalt.report.compared_page import comparison_page
    from fedalt.report.records import read_record
    from fedalt.report.run_page import run_page

    pages = {folder: comparison_page(folder), run: run_page(read_record(run))}
    for place, page in pages.items():
        write_page(page, place / PAGE)
    return [place / PAGE for place in pages]


def _point_to(
    folder: Path, run: Path, scores: "Table", pages: Sequence[Path], *, quiet: bool
) -> None:
    client = scores.clients[0].name
    note(f"tables, runs and data lie in {folder}", quiet=quiet)
    for page in pages:
        note(f"open in a browser: {page}", quiet=quiet)
    if not pages:
        note("`pip install 'fedalt[report]'`, and `fedalt report` writes a page", quiet=quiet)
    note(f"try: fedalt generate {run} --client {client}", quiet=quiet)
    note(f"     fedalt chat {run}", quiet=quiet)
    note(f"     fedalt export {run} --client {client} --out my-model", quiet=quiet)
    note("     fedalt run --data YOUR_FOLDER --model YOUR_MODEL", quiet=quiet)
