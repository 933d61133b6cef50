"""`fedalt compare` and `tune`: several methods under one budget, and a fair choice of settings."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet, numbers_of
from fedalt.cli.output import console, hush_libraries, note, show_json
from fedalt.core.foreign import shown

if TYPE_CHECKING:
    from fedalt.report.comparison import Results
    from fedalt.runs.compare import Entry, Job
    from fedalt.runs.tune import Trial

File = Annotated[Path, typer.Argument(metavar="FILE.toml", help="Methods, seeds, one budget.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of all runs and of the results.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Runs at a time; without it, one per core, or one per GPU."),
]


def compare(
    file: File,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder of all runs and of the results.")
    ] = None,
    cells: Annotated[
        Path | None,
        typer.Option(
            "--results", help="File that keeps finished cells; without --out nothing is run."
        ),
    ] = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run several methods with the same data, seeds, splits, first values and budget.

    Every method and seed is a run below the folder; what is finished stays, what was stopped goes
    on. Ends with tables of scores and losses, methods by tasks, and what each method costs.

    A file of results holds finished cells, a method with a seed each, to be committed: no cell in
    it is computed again. Without a folder the tables are made from it alone.
    """
    if out is None and cells is None:
        raise typer.BadParameter("give --out, a folder to run in, or --results, a file of cells")
    hush_libraries()
    from fedalt.cli.cells import complete_cells, require_cells
    from fedalt.cli.jobs import run_jobs
    from fedalt.report.cells import results_of
    from fedalt.report.comparison import collect, write_results
    from fedalt.runs.cells import read_cells
    from fedalt.runs.compare import jobs_of, read_comparison
    from fedalt.runs.view import view_in

    (entries, seeds), view = read_comparison(file), view_in(file)
    _tell_advice(entries, quiet=quiet)
    if view.steps == "equal":
        entries = _with_equal_steps(entries, quiet=quiet)
    runs = jobs_of(entries, seeds, out or Path())
    failed: list[Job] = []
    if cells is None:
        failed = run_jobs(runs, jobs, quiet=quiet)
        whole = [entry for entry in entries if not any(job.entry == entry for job in failed)]
        results = collect(whole, seeds, runs, view)
    else:
        if out is None:
            require_cells(cells, entries, runs, quiet=quiet)
        else:
            failed = complete_cells(cells, entries, runs, jobs, quiet=quiet)
        results = results_of(entries, seeds, read_cells(cells), view)
    if results.entries:
        if out is not None:
            write_results(out, results)
        _show_results(results, out, as_json=as_json, quiet=quiet)
    elif not failed:
        raise typer.BadParameter(f"{cells} has no method of {file} with all its seeds")
    if failed:
        raise typer.Exit(1)


def _with_equal_steps(entries: "Sequence[Entry]", *, quiet: bool) -> "tuple[Entry, ...]":
    """The methods with the rounds that equal steps leave them, and a note of each with fewer."""
    from fedalt.runs.steps import with_equal_steps

    equal = tuple(replace(entry, settings=with_equal_steps(entry.settings)) for entry in entries)
    for before, after in zip(entries, equal, strict=True):
        rounds, left = (entry.settings.rounds.rounds for entry in (before, after))
        if left < rounds:
            why = "it trains more than once a round, or before it serves"
            note(f"{after.label}: {left} rounds for {rounds} of others: {why}", quiet=quiet)
    return equal


def _show_results(results: "Results", out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """The tables and the gaps, and where the files lie."""
    from fedalt.report.comparison import budget_of, gaps_of, grids_of
    from fedalt.report.gaps import ABOUT_GAPS
    from fedalt.report.grid import draw_gaps, draw_grid
    from fedalt.report.headline import heading
    from fedalt.report.table import to_json

    if as_json:
        tables = {name: to_json(table) for name, table in results.tables().items()}
        gaps = [asdict(gap) for gap in gaps_of(results)]
        show_json({"folder": None if out is None else str(out), **tables, "gaps": gaps})
        return
    for name, grid in grids_of(results).items():
        what = heading(results.view.metric if name == "scores" else "loss")
        console().print(draw_grid(grid, f"{what} on test data"))
        if grid.gaps:
            console().print(draw_gaps(grid, f"{what}: gaps of means, above 0 is better"))
    for sentence in (*budget_of(results), ABOUT_GAPS):
        note(sentence, quiet=quiet)
    if out is not None:
        files = "results.jsonl, table.md, table.csv, gaps.csv and clients.csv"
        note(f"{files} lie in {out}", quiet=quiet)


def tune(
    file: File,
    out: Out,
    lr: Annotated[
        str | None, typer.Option("--lr", help="Learning rates to try, with commas.")
    ] = None,
    rank: Annotated[str | None, typer.Option("--rank", help="Ranks to try, with commas.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each trial; without it, the file's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Without it, the file's first.")] = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose settings for every method of a comparison, on validation data alone.

    Learning rates and ranks are flags; a section [tune], common or a method's own, lists values of
    any setting. All methods get as many trials. The test data are never read. Writes
    OUT/tuned.toml, a file for `fedalt compare`.
    """
    hush_libraries()
    from fedalt.cli.jobs import run_jobs
    from fedalt.runs.compare import jobs_of, read_comparison
    from fedalt.runs.folder import open_run
    from fedalt.runs.tune import best_of, trials_in, trials_of, write_tuned

    entries, seeds = read_comparison(file)
    _tell_advice(entries, quiet=quiet)
    flags = {
        **({"lr": numbers_of(lr, float, "--lr")} if lr else {}),
        **({"rank": numbers_of(rank, int, "--rank")} if rank else {}),
    }
    trials = trials_of(entries, flags, trials_in(file), rounds)
    at = seeds[0] if seed is None else seed
    runs = jobs_of([trial.entry for trial in trials], [at], out)
    if run_jobs(runs, jobs, quiet=quiet):
        raise typer.Exit(1)
    losses = [loss for job in runs if (loss := open_run(job.path).best_loss()) is not None]
    if len(losses) < len(runs):
        raise typer.BadParameter("no client has validation data to choose by")
    chosen = best_of(trials, losses)
    lines = write_tuned(out, file, trials, losses)
    if as_json:
        show_json({"tuned": str(out / "tuned.toml"), "trials": lines})
        return
    _show_trials(trials, losses, list(chosen.values()))
    if edges := [trial.label for trial in chosen.values() if trial.at_edge(trials)]:
        note(f"chosen at the edge of what was tried: {', '.join(edges)}", quiet=quiet)
    note(f"`fedalt compare {out / 'tuned.toml'} --out ...` compares with these", quiet=quiet)


def _show_trials(
    trials: "Sequence[Trial]", losses: Sequence[float], chosen: "Sequence[Trial]"
) -> None:
    """All trials as a table, the chosen ones in bold."""
    from rich.text import Text

    from fedalt.report.sheet import Sheet

    rows = []
    for trial, loss in zip(trials, losses, strict=True):
        tried = ", ".join(f"{name} = {value}" for name, value in trial.values.items())
        style = "bold" if trial in chosen else ""
        cells = (shown(trial.label), shown(tried), f"{loss:.3f}")
        rows.append([Text(cell, style=style) for cell in cells])
    console().print(Sheet(("method", "tried", "validation loss"), rows))


def _tell_advice(entries: "Sequence[Entry]", *, quiet: bool) -> None:
    """What was taken of a base model's recommended settings, once for all methods alike."""
    by_sentence: dict[str, list[str]] = {}
    for entry in entries:
        by_sentence.setdefault(entry.advice, []).append(entry.label)
    for sentence, labels in by_sentence.items():
        if sentence:
            who = "" if len(by_sentence) == 1 else f"{', '.join(labels)}: "
            note(f"{who}{sentence}", quiet=quiet)
