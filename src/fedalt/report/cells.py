"""From finished runs to cells of a comparison, and from cells to its results."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from fedalt.methods.notes import notes_on
from fedalt.report.comparison import Compared, Results
from fedalt.report.costs import cost_of
from fedalt.report.table import Scored, scores_of
from fedalt.runs.base_scores import base_rows
from fedalt.runs.cells import Cell
from fedalt.runs.compare import Entry, Job
from fedalt.runs.folder import open_run
from fedalt.runs.kept_settings import settings_table
from fedalt.runs.origin import settings_in
from fedalt.runs.view import USUAL, View


def cell_of(job: Job, rehearsal: Sequence[float]) -> Cell:
    """The cell that a finished run of a comparison is."""
    lines = open_run(job.path).lines()
    tested = (line for line in lines if line["kind"] == "score" and line["split"] == "test")
    return Cell(
        method=job.entry.label,
        seed=job.seed,
        fedalt=version("fedalt"),
        settings=settings_in(job.path, job.settings),
        rehearsal=rehearsal,
        costs=cost_of(job.path),
        scores={
            column: scores_of(lines, column)
            for column in dict.fromkeys(line["column"] for line in tested)
        },
    )


def collect(
    entries: Sequence[Entry], seeds: Sequence[int], jobs: Sequence[Job], view: View = USUAL
) -> Results:
    """The results of methods whose runs have all been finished."""
    runs = {(job.entry.label, job.seed): open_run(job.path) for job in jobs}
    of = {entry.label: [runs[entry.label, seed] for seed in seeds] for entry in entries}
    return Results(
        [_compared(entry) for entry in entries],
        seeds,
        {label: [scores_of(run.lines(), "own") for run in group] for label, group in of.items()},
        {label: [cost_of(run.path) for run in group] for label, group in of.items()},
        view,
    )


def results_of(
    entries: Iterable[Entry],
    seeds: Sequence[int],
    cells: Mapping[tuple[str, int], Cell],
    view: View,
) -> Results:
    """The results of the methods whose cells of all seeds are there."""
    whole = [entry for entry in entries if all((entry.label, seed) in cells for seed in seeds)]
    of = {entry.label: [cells[entry.label, seed] for seed in seeds] for entry in whole}
    return Results(
        [_compared(entry) for entry in whole],
        seeds,
        {label: [cell.scores["own"] for cell in group] for label, group in of.items()},
        {label: [cell.costs for cell in group] for label, group in of.items()},
        view,
        base_rows(_bases(of)),
    )


def _compared(entry: Entry) -> Compared:
    settings = entry.settings
    notes = notes_on(settings.method, settings.rounds.rounds)
    return Compared(entry.label, settings_table(settings), tuple(notes))


def _bases(of: Mapping[str, Sequence[Cell]]) -> dict[tuple[str, ...], Scored]:
    """Scores of base models by the labels of the methods that share them."""
    scores = {
        label: cell.scores["base"]
        for label, cells in of.items()
        for cell in reversed(cells)
        if "base" in cell.scores
    }
    bases: dict[tuple[str, ...], Scored] = {}
    for known in scores.values():
        bases[tuple(label for label in scores if scores[label] == known)] = known
    return bases
