"""A comparison whose finished cells are kept in a file: only what is missing there is run."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedalt.cli.jobs import run_jobs
from fedalt.cli.output import note
from fedalt.report.cells import cell_of
from fedalt.runs.base_scores import base_scores
from fedalt.runs.cells import keep_cell, named, read_cells
from fedalt.runs.compare import Entry, Job, write_settings
from fedalt.runs.kept_settings import that_count
from fedalt.runs.origin import Origin, note_origin, origins_of


def complete_cells(
    file: Path,
    entries: Sequence[Entry],
    jobs: Sequence[Job],
    out: Path,
    workers: int | None,
    *,
    quiet: bool,
) -> list[Job]:
    """Run what the file has no cell of, and add each cell as it is finished; those that failed.

    Cells of other settings or code are refused before anything runs. Runs that are finished
    already become cells as they are.
    """
    cells = read_cells(file)
    note(f"{len(entries)} methods are rehearsed, in a second or two each", quiet=quiet)
    origins: dict[str, Origin] = {}
    for label, origin in origins_of(entries):
        origins[label] = origin
        for cell in cells.values():
            if cell.method == label:
                origin.require(cell, file)
    missing = [job for job in jobs if (job.entry.label, job.seed) not in cells]
    for job in jobs:
        if job in missing:
            note_origin(job, origins[job.entry.label].numbers)
        elif not job.path.exists():
            write_settings(job)

    def keep(job: Job) -> None:
        origin = origins[job.entry.label]
        cell = cell_of(job, origin.numbers)
        origin.require(cell, file)
        keep_cell(file, cell)

    note(f"{len(jobs)} cells, {len(jobs) - len(missing)} found in {file}", quiet=quiet)
    failed = run_jobs(missing, workers, quiet=quiet, finished=keep) if missing else []
    _score_bases(file, [job for job in jobs if job not in failed], out, quiet=quiet)
    return failed


def _score_bases(file: Path, jobs: Sequence[Job], out: Path, *, quiet: bool) -> None:
    """Add the base model's scores to the cells that lack them and whose runs are here.

    Those of a comparison that was stopped before it came to this are among them.
    """
    cells = read_cells(file)
    without = {key for key, cell in cells.items() if "base" not in cell.scores}
    here = [job for job in jobs if (job.entry.label, job.seed) in without and job.is_begun]
    for labels, scores in base_scores(here, out, partial(note, quiet=quiet)).items():
        for key in sorted(without):
            if scores and key[0] in labels:
                cell = cells[key]
                keep_cell(file, replace(cell, scores={**cell.scores, "base": scores}))


def require_cells(
    file: Path, entries: Sequence[Entry], jobs: Sequence[Job], *, quiet: bool
) -> None:
    """Look at a file's cells without data, base model or runs; tell which are missing.

    Raises StoreError for a cell of other settings.
    """
    cells = read_cells(file)
    origins = {entry.label: Origin(that_count(entry.settings)) for entry in entries}
    for job in jobs:
        key = job.entry.label, job.seed
        if key in cells:
            origins[job.entry.label].require(cells[key], file)
        else:
            note(f"{file} has no cell {named(key)}; with --out it is run", quiet=quiet)
