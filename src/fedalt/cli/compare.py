"""`fedalt compare` and `tune`: several methods under one budget, and a fair choice of settings."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalt.cli.flags import AsJson, Quiet, numbers_of
from fedalt.cli.output import console, hush_libraries, note, show_json
from fedalt.core.foreign import shown

if TYPE_CHECKING:
    from fedalt.report.comparison import Results
    from fedalt.runs.compare import Entry, Job
    from fedalt.runs.tune import Losses, Stage, Trial
    from fedalt.runs.view import View

File = Annotated[Path, typer.Argument(metavar="FILE.toml", help="Methods, seeds, one budget.")]
_OUT = typer.Option("--out", help="The folder of all runs and of the results.")
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Runs at a time; without it, one per core, or one per GPU."),
]
Stages = Annotated[
    int | None,
    typer.Option(
        "--stages",
        min=1,
        help="1 gives all trials all rounds.",
        show_default="as many as fit; 1 if a last round is tested",
    ),
]


def compare(
    file: File,
    out: Annotated[Path | None, _OUT] = None,
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
    from fedalt.report.cells import results_of
    from fedalt.report.comparison import write_results
    from fedalt.runs.cells import read_cells
    from fedalt.runs.comparable import require_tests
    from fedalt.runs.compare import jobs_of, read_comparison
    from fedalt.runs.view import view_in

    (entries, seeds), view = read_comparison(file), view_in(file)
    require_tests(file, entries)
    _tell_advice(entries, quiet=quiet)
    if view.steps == "equal":
        entries = _with_equal_steps(entries, quiet=quiet)
    if cells is None:
        assert out is not None
        results, failed = _run(entries, seeds, view, out, jobs, quiet=quiet)
    else:
        runs, failed = jobs_of(entries, seeds, out or Path()), []
        if out is None:
            require_cells(cells, entries, runs, quiet=quiet)
        else:
            failed = complete_cells(cells, entries, runs, out, jobs, quiet=quiet)
        results = results_of(entries, seeds, read_cells(cells), view)
    if results.entries:
        if out is not None:
            write_results(out, results)
        _show_results(results, out, as_json=as_json, quiet=quiet)
    elif not failed:
        raise typer.BadParameter(f"{cells} has no method of {file} with all its seeds")
    if failed:
        raise typer.Exit(1)


def _run(
    entries: "Sequence[Entry]",
    seeds: Sequence[int],
    view: "View",
    out: Path,
    jobs: int | None,
    *,
    quiet: bool,
) -> "tuple[Results, list[Job]]":
    """The results of all runs, brought to their ends, and those that failed."""
    from fedalt.cli.jobs import run_jobs
    from fedalt.report.cells import collect
    from fedalt.runs.base_scores import base_rows, base_scores
    from fedalt.runs.comparable import require_one_base
    from fedalt.runs.compare import jobs_of

    runs = jobs_of(entries, seeds, out)
    failed = run_jobs(runs, jobs, quiet=quiet)
    require_one_base(runs)
    whole = [entry for entry in entries if not any(job.entry == entry for job in failed)]
    finished = [job for job in runs if job.entry in whole]
    results = collect(whole, seeds, finished, view)
    base = base_scores(finished, out, partial(note, quiet=quiet))
    return replace(results, base=base_rows(base)), failed


def _with_equal_steps(entries: "Sequence[Entry]", *, quiet: bool) -> "tuple[Entry, ...]":
    """The methods with the rounds that equal steps leave them, and a note of each with fewer."""
    from fedalt.runs.steps import with_equal_steps

    equal = tuple(replace(entry, settings=with_equal_steps(entry.settings)) for entry in entries)
    for before, after in zip(entries, equal, strict=True):
        rounds, left = (entry.settings.rounds.rounds for entry in (before, after))
        if left < rounds:
            why = "it trains more than once a round, or before it serves"
            shorter = f"{left} of the others' {rounds} rounds"
            note(f"{after.label}: {shorter}: {why}", quiet=quiet)
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
        folder = None if out is None else str(out)
        show_json({"folder": folder, **tables, "base": results.base, "gaps": gaps})
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
    out: Annotated[Path, _OUT],
    lr: Annotated[
        str | None, typer.Option("--lr", help="Learning rates to try, with commas.")
    ] = None,
    rank: Annotated[str | None, typer.Option("--rank", help="Ranks to try, with commas.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of the longest trials; by default the file's.")
    ] = None,
    stages: Stages = None,
    seed: Annotated[int | None, typer.Option(help="Without it, the file's first.")] = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose settings for every method of a comparison, on validation data alone.

    Learning rates and ranks are flags; a section [tune], common or a method's own, lists values of
    any setting. All methods get as many trials and rounds: all trials begin with few rounds, the
    better half goes on with twice as many; where the last round is tested, all have all rounds. The
    test data are never read. Writes OUT/tuned.toml, a file for `fedalt compare`. The same command
    goes on with what was stopped.
    """
    hush_libraries()
    from fedalt.runs import tune as search
    from fedalt.runs.compare import read_comparison
    from fedalt.runs.view import view_in

    (entries, seeds), equal_steps = read_comparison(file), view_in(file).steps == "equal"
    _tell_advice(entries, quiet=quiet)
    flags = {
        **({"lr": numbers_of(lr, float, "--lr")} if lr else {}),
        **({"rank": numbers_of(rank, int, "--rank")} if rank else {}),
    }
    wanted, halvings = search.numbers_in(file)
    at = seeds[0] if seed is None else seed
    trials = search.trials_of(entries, flags, wanted, at, equal_steps=equal_steps)
    length = rounds or search.rounds_of(entries)
    halvings = stages or halvings or (1 if search.needs_all_rounds(entries) else None)
    plan = search.stages_of(
        len(trials) // len(entries), length, halvings, whole=search.is_planned(entries)
    )
    _tell_plan(entries, plan, equal_steps=equal_steps, quiet=quiet)
    score = partial(_losses, seed=at, out=out, jobs=jobs, quiet=quiet)
    losses = search.halve(trials, plan, score)
    chosen = search.best_of(trials, losses)
    if nothing := [entry.label for entry in entries if entry.label not in chosen]:
        note(f"no trial of {', '.join(nothing)} has succeeded, so there is nothing to choose")
        raise typer.Exit(1)
    lines = search.write_tuned(out, file, trials, losses, plan)
    if as_json:
        show_json({"tuned": str(out / "tuned.toml"), "trials": lines})
        return
    _show_trials(trials, losses, plan, list(chosen.values()))
    if edges := [trial.label for trial in chosen.values() if trial.at_edge(trials)]:
        note(f"chosen at the edge of what was tried: {', '.join(edges)}", quiet=quiet)
    note(f"`fedalt compare {out / 'tuned.toml'} --out ...` compares with these", quiet=quiet)


def _losses(
    trials: "Sequence[Trial]", rounds: int, *, seed: int, out: Path, jobs: int | None, quiet: bool
) -> list[float]:
    """The validation losses of trials that have gone on to so many rounds; inf where one failed."""
    from fedalt.cli.jobs import run_jobs
    from fedalt.runs.compare import jobs_of
    from fedalt.runs.tune import validation_loss

    runs = jobs_of([trial.after(rounds) for trial in trials], [seed], out)
    failed = run_jobs(runs, jobs, quiet=quiet, grows=True)
    losses = [
        inf
        if job in failed
        else validation_loss(job.path, job.settings.rounds, job.settings.clients)
        for job in runs
    ]
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        raise typer.BadParameter("no client has validation data to choose by")
    return known


def _show_trials(
    trials: "Sequence[Trial]",
    losses: "Sequence[Losses]",
    stages: "Sequence[Stage]",
    chosen: "Sequence[Trial]",
) -> None:
    """All trials as a table, the chosen ones in bold."""
    from rich.text import Text

    from fedalt.report.sheet import Sheet

    rows = []
    for trial, of_trial in zip(trials, losses, strict=True):
        tried = ", ".join(f"{name} = {value}" for name, value in trial.values.items())
        style = "bold" if trial in chosen else ""
        numbers = ["failed" if loss == inf else f"{loss:.3f}" for loss in of_trial]
        numbers += ["–"] * (len(stages) - len(numbers))
        rows.append(
            [Text(cell, style=style) for cell in (shown(trial.label), shown(tried), *numbers)]
        )
    heads = [f"loss, {stage.rounds} round{'s' * (stage.rounds > 1)}" for stage in stages]
    console().print(
        Sheet(("method", "tried", *heads), rows, "validation loss of the round to test")
    )


def _tell_plan(
    entries: "Sequence[Entry]", stages: "Sequence[Stage]", *, equal_steps: bool, quiet: bool
) -> None:
    """What every method gets, and which ones the first stage is too short for."""
    from fedalt.methods.notes import notes_on
    from fedalt.runs.tune import budget_of

    note(budget_of(stages), quiet=quiet)
    short = tuple(entry.lasting(stages[0].rounds) for entry in entries)
    long = tuple(entry.lasting(stages[-1].rounds) for entry in entries)
    if equal_steps:  # as each trial does it with its own settings
        short = _with_equal_steps(short, quiet=True)
        long = _with_equal_steps(long, quiet=quiet)
    for first, last in zip(short, long, strict=True):
        method = first.settings.method
        known = set(notes_on(method, last.settings.rounds.rounds))
        for sentence in notes_on(method, first.settings.rounds.rounds):
            if sentence not in known:
                note(f"note: the first stage, {first.label}: {sentence}", quiet=quiet)


def _tell_advice(entries: "Sequence[Entry]", *, quiet: bool) -> None:
    """What was taken of a base model's recommended settings, once for all methods alike."""
    by_sentence: dict[str, list[str]] = {}
    for entry in entries:
        by_sentence.setdefault(entry.advice, []).append(entry.label)
    for sentence, labels in by_sentence.items():
        if sentence:
            who = "" if len(by_sentence) == 1 else f"{', '.join(labels)}: "
            note(f"{who}{sentence}", quiet=quiet)
