"""`fedalt compare` and `tune`: several methods under one budget, and a fair choice of settings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedalt.cli.flags import AsJson, Quiet
from fedalt.cli.output import console, hush_libraries, note, show_json

if TYPE_CHECKING:
    from fedalt.comparison import Entry, Job

File = Annotated[Path, typer.Argument(metavar="FILE.toml", help="Methods, seeds, one budget.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of all runs and of the results.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Runs at a time; without it, one per core, or one per GPU."),
]
HEADS = ("trainable", "upload kB", "download kB", "seconds", "peak MB")


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
    from fedalt.comparison import jobs_of, read_comparison

    entries, seeds = read_comparison(file)
    runs = jobs_of(entries, seeds, out)
    failed = run_jobs(runs, jobs, quiet=quiet)
    whole = [entry for entry in entries if not any(job.entry == entry for job in failed)]
    if whole:
        result = _results(whole, seeds, runs, out, quiet=quiet or as_json)
        if as_json:
            show_json(result)
    if failed:
        raise typer.Exit(1)


def tune(
    file: File,
    out: Out,
    lr: Annotated[str, typer.Option("--lr", help="Learning rates to try, with commas.")],
    rank: Annotated[str | None, typer.Option("--rank", help="Ranks to try, with commas.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each trial; without it, the file's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Without it, the file's first.")] = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose learning rate and rank for every method of a comparison, on validation data alone.

    All methods get the same trials. The test data are never read. Writes OUT/tuned.toml, a file
    for `fedalt compare`.
    """
    hush_libraries()
    from fedalt.cli.jobs import run_jobs
    from fedalt.comparison import jobs_of, read_comparison
    from fedalt.store import open_run
    from fedalt.tuning import Trial, tuned_table, write_toml

    entries, seeds = read_comparison(file)
    trials = [
        Trial.of(entry, rate, each, rounds)
        for entry in entries
        for rate in _numbers(lr, float, "--lr")
        for each in (_numbers(rank, int, "--rank") if rank else [None])
    ]
    at = seeds[0] if seed is None else seed
    runs = jobs_of([trial.entry for trial in trials], [at], out)
    if run_jobs(runs, jobs, quiet=quiet):
        raise typer.Exit(1)
    losses: list[float] = []
    for job in runs:
        best = open_run(job.path).best_loss()
        if best is None:
            raise typer.BadParameter("no client has validation data to choose by")
        losses.append(best)
    chosen: dict[str, Trial] = {}
    for trial, _ in sorted(zip(trials, losses, strict=True), key=lambda pair: pair[1]):
        chosen.setdefault(trial.label, trial)
    lines = [
        {**trial.facts(), "validation_loss": loss}
        for trial, loss in zip(trials, losses, strict=True)
    ]
    (out / "tune.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_toml(out / "tuned.toml", tuned_table(file, chosen))
    edges = [trial.label for trial in chosen.values() if trial.at_edge(trials)]
    if as_json:
        show_json({"tuned": str(out / "tuned.toml"), "trials": lines})
        return
    from rich.table import Table

    drawn = Table("method", "lr", "rank", "validation loss")
    for trial, loss in zip(trials, losses, strict=True):
        style = "bold" if chosen[trial.label] == trial else ""
        drawn.add_row(trial.label, f"{trial.lr:g}", str(trial.rank), f"{loss:.3f}", style=style)
    console().print(drawn)
    if edges:
        note(f"chosen at the edge of what was tried: {', '.join(edges)}", quiet=quiet)
    note(f"`fedalt compare {out / 'tuned.toml'} --out ...` compares with these", quiet=quiet)


def _results(
    entries: "Sequence[Entry]",
    seeds: Sequence[int],
    runs: "Sequence[Job]",
    out: Path,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Write results.jsonl and the tables; show them unless quiet."""
    from fedalt.comparison import cost_of
    from fedalt.report.comparison import draw_grid, grid_csv, grid_markdown, grid_of
    from fedalt.report.table import joined, scores_of, to_csv, to_json
    from fedalt.store import open_run

    of = {(job.entry.label, job.seed): job for job in runs}
    columns = {
        entry.label: [
            scores_of(open_run(of[entry.label, seed].path).lines(), "own") for seed in seeds
        ]
        for entry in entries
    }
    costs = {key: cost_of(job.path) for key, job in of.items() if key[0] in columns}
    lines: list[Mapping[str, Any]] = [
        {"method": label, "seed": seed, "client": client, "metric": metric, "value": value}
        for label, scored in columns.items()
        for seed, clients in zip(seeds, scored, strict=True)
        for client, metrics in clients.items()
        for metric, value in metrics.items()
    ]
    lines += [{"method": key[0], "seed": key[1], **asdict(cost)} for key, cost in costs.items()]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = {
        entry.label: _cost_cells([costs[entry.label, seed] for seed in seeds]) for entry in entries
    }
    tables = {"scores": joined(columns), "losses": joined(columns, losses=True)}
    grids = {name: grid_of(table) for name, table in tables.items()}
    budget = list(_budget(entries, seeds))
    parts = [*budget, *(grid_markdown(grid, shown, HEADS) for grid in grids.values())]
    (out / "table.md").write_text("\n".join(f"{part.rstrip()}\n" for part in parts))
    (out / "table.csv").write_text(grid_csv(grids["scores"]))
    (out / "clients.csv").write_text(to_csv(tables["scores"]))
    if not quiet:
        for name, grid in grids.items():
            console().print(draw_grid(grid, f"{name} on test data"))
        for sentence in budget:
            note(sentence)
        note(f"results.jsonl, table.md, table.csv and clients.csv lie in {out}")
    return {"folder": str(out), **{name: to_json(table) for name, table in tables.items()}}


def _cost_cells(costs: Sequence[Any]) -> list[str]:
    """Means over the seeds, in the order of HEADS."""
    return [
        str(costs[0].trainable_numbers),
        f"{fmean(cost.upload_bytes for cost in costs) / 1e3:.1f}",
        f"{fmean(cost.download_bytes for cost in costs) / 1e3:.1f}",
        f"{fmean(cost.seconds for cost in costs):.0f}",
        f"{max(cost.peak_memory_bytes for cost in costs) / 1e6:.0f}",
    ]


def _budget(entries: "Sequence[Entry]", seeds: Sequence[int]) -> Iterator[str]:
    """What all methods have in common, and where one differs."""
    from fedalt.settings import lora_of

    def facts(entry: "Entry") -> dict[str, Any]:
        settings = entry.settings
        training, rounds = settings.training, settings.rounds
        return {
            "rounds": rounds.rounds,
            "local epochs": training.local_epochs,
            "batch size": training.batch_size,
            "learning rate": training.lr,
            "rank": lora_of(settings.method).rank,
            "participation": rounds.participation,
            "tested round": rounds.select,
            "model": settings.model.name,
            "data": settings.data.path.name,
        }

    common = facts(entries[0])
    common_words = ", ".join(f"{key} {value}" for key, value in common.items())
    seeds_words = ", ".join(map(str, seeds))
    yield f"{common_words}; seeds {seeds_words}; cells are means ± standard deviations over seeds."
    for entry in entries[1:]:
        own = {key: value for key, value in facts(entry).items() if value != common[key]}
        if own:
            yield f"{entry.label}: {', '.join(f'{key} {value}' for key, value in own.items())}."
    yield (
        "Bold: best of its column, and told from the second best by Wilcoxon's signed-rank test "
        "over (client, seed) pairs, p < 0.05; columns of fewer than six pairs have none. Bytes are "
        "means per client and round, seconds are those of training, peak memory is the process's."
    )


def _numbers(text: str, kind: Any, flag: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{flag}: expected numbers with commas, got {text!r}") from None
