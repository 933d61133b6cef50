"""Several runs at a time as a user sees them: signs of life, what failed, and a way back."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing

import typer

from fedalt.cli.output import note
from fedalt.report.learning import nothing_learnt
from fedalt.runs.comparable import require_data, require_one_base, require_same
from fedalt.runs.compare import Job, default_workers, rounds_done, run_all
from fedalt.runs.folder import open_run
from fedalt.runs.length import is_finished

_MINUTE = 60.0


def run_jobs(
    jobs: Sequence[Job],
    workers: int | None,
    *,
    quiet: bool,
    grows: bool = False,
    finished: Callable[[Job], None] | None = None,
) -> list[Job]:
    """Bring all runs to their ends, so many at a time; those that failed. What is done stays.

    Runs that `grows` may have had other numbers of rounds before, fewer or more. `finished` hears
    of each run once it is, of those that have been before first of all.
    """
    require_same(jobs, grows=grows)
    require_data(jobs)
    require_one_base(jobs)
    todo = [job for job in jobs if not _is_done(job)]
    for job in jobs:
        if finished is not None and job not in todo:
            finished(job)
    workers = workers or default_workers(jobs)
    note(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished, {workers} at a time", quiet=quiet)
    failed: list[Job] = []
    ended, began, before = 0, time.monotonic(), rounds_done(todo)
    rounds = sum(job.settings.rounds.rounds for job in todo)
    try:
        with closing(run_all(todo, workers)) as events:
            for event in events:
                done = rounds_done(todo)
                if event is None:
                    left = (time.monotonic() - began) * (rounds - done) / max(done - before, 1)
                    told = f", {max(left / _MINUTE, 1):.0f} min left" if done > before else ""
                    where = f"{ended} of {len(todo)} runs, {done} of {rounds} rounds"
                    note(f"{where} done{told}", quiet=quiet)
                    continue
                ended += 1
                job, fault = event
                what = f"{job.entry.label}, seed {job.seed}"
                if fault is None:
                    if finished is not None:
                        finished(job)
                    note(f"{what}: done; in {job.path}", quiet=quiet)
                    if sentence := nothing_learnt(job.path):
                        note(f"note: {what}: {sentence}", quiet=quiet)
                else:
                    failed.append(job)
                    note(f"{what}: {fault}\n  more in {job.path.with_suffix('.log')}")
    except KeyboardInterrupt:
        note("stopped; the same command goes on")
        raise typer.Exit(130) from None
    return failed


def _is_done(job: Job) -> bool:
    """Whether a run has all its rounds, and its test if there is to be one."""
    if not job.is_begun:
        return False
    rounds = job.settings.rounds
    done = open_run(job.path).rounds_done() >= rounds.rounds
    return done and (not rounds.test or is_finished(job.path))
