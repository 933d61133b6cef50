"""`fedalt compare` and `tune`: several methods under one budget, and a fair choice of settings."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet, numbers_of
from fedalt.cli.output import console, hush_libraries, note, show_json
from fedalt.core.foreign import shown

if TYPE_CHECKING:
    from fedalt.runs.compare import Entry
    from fedalt.runs.tune import Trial

File = Annotated[Path, typer.Argument(metavar="FILE.toml", help="Methods, seeds, one budget.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of all runs and of the results.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Runs at a time; without it, one per core, or one per GPU."),
]


def compare(
    file: File,
    out: Out,
    jobs: Jobs = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run several methods with the same data, seeds, splits, first values and budget.

    Every method and seed is a run below the folder; what is finished stays, what was stopped goes
    on. Ends with tables of scores and losses, methods by tasks, and what each method costs.
    """
    hush_libraries()
    from fedalt.cli.jobs import run_jobs
    from fedalt.report.comparison import (
        budget_of,
        collect,
        draw_grid,
        gaps_of,
        grid_of,
        write_results,
    )
    from fedalt.report.table import to_json
    from fedalt.runs.compare import jobs_of, read_comparison

    entries, seeds = read_comparison(file)
    _tell_advice(entries, quiet=quiet)
    runs = jobs_of(entries, seeds, out)
    failed = run_jobs(runs, jobs, quiet=quiet)
    whole = [entry for entry in entries if not any(job.entry == entry for job in failed)]
    if whole:
        results = collect(whole, seeds, runs)
        write_results(out, results)
        if as_json:
            tables = {name: to_json(table) for name, table in results.tables().items()}
            gaps = [asdict(gap) for gap in gaps_of(results)]
            show_json({"folder": str(out), **tables, "gaps": gaps})
        else:
            for name, table in results.tables().items():
                console().print(draw_grid(grid_of(table), f"{name} on test data"))
            for sentence in budget_of(results):
                note(sentence, quiet=quiet)
            files = "results.jsonl, table.md, table.csv, gaps.csv and clients.csv"
            note(f"{files} lie in {out}", quiet=quiet)
    if failed:
        raise typer.Exit(1)


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
