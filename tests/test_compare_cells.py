"""Cells of a comparison in a file: computed once, found again, refused where they do not fit."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from commands import call
from runs_for_tests import save_model, write_clients

from fedalt.core.reading import StoreError
from fedalt.methods import METHODS
from fedalt.methods.mean import weighted_mean
from fedalt.runs.cells import Cell, Cost, keep_cell, read_cells
from fedalt.runs.compare import Job
from fedalt.runs.kept_settings import that_count
from fedalt.runs.origin import Origin, note_origin
from fedalt.runs.rehearsal import difference, rehearse
from fedalt.runs.settings import settings_of

CELL = Cell("local", 0, "0", {}, [], Cost(0, 0, 0, 0, 0), {"own": {"a": {"loss": 1.0}}})

FILE = """
seeds = [0]
[data]
path = "data"
max_length = 60
validation = 0.2
[model]
name = "./model"
device = "cpu"
[training]
lr = 1e-2
batch_size = 4
[rounds]
rounds = 1
[scoring]
generate = false
[[methods]]
name = "fedit"
rank = 2
[[methods]]
name = "local"
rank = 2
"""


def nobody(jobs, workers):
    """In the place of `run_all`: there is nothing to run."""
    assert not jobs
    yield from ()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A comparison of two methods that was killed after its first cell; its file has that one."""
    place = tmp_path_factory.mktemp("cells")
    save_model(place / "model")
    write_clients(place / "data", clients=("a", "b"))
    (place / "methods.toml").write_text(FILE)
    words = ("compare", "methods.toml", "--out", "out", "--results", "cells.jsonl", "--jobs", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "fedalt", *words], cwd=place, start_new_session=True
    )
    try:
        while not (place / "cells.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (first,) = read_cells(place / "cells.jsonl")
    assert first == ("fedit", 0)
    return place


@pytest.fixture(scope="module")
def whole(place):
    """The same, gone on with on a machine that lacks the run of the first cell."""
    shutil.rmtree(place / "out" / "fedit")
    words = ("--out", place / "out", "--results", place / "cells.jsonl", "--quiet")
    assert call("compare", place / "methods.toml", *words) == 0
    return place


@pytest.mark.slow
def test_a_cell_that_is_there_is_not_computed_again_and_joins_the_table(whole):
    assert not (whole / "out" / "fedit" / "seed-0").exists()
    assert (whole / "out" / "local" / "seed-0" / "run.json").exists()
    cells = read_cells(whole / "cells.jsonl")
    assert list(cells) == [("fedit", 0), ("local", 0)]
    assert "| fedit |" in (whole / "out" / "table.md").read_text()
    for line in (whole / "cells.jsonl").read_text().splitlines():
        assert len(line) < 4000
    cell = cells["fedit", 0]
    assert cell.scores.keys() >= {"own"}
    assert cell.scores["own"].keys() == {"a", "b"}
    assert cell.costs.steps == 3  # 12 records, of which 3 validate: batches of 4
    assert str(whole) not in (whole / "cells.jsonl").read_text()
    assert call("report", whole / "out", "--out", whole / "page.html", "--quiet") == 0


@pytest.mark.slow
def test_finished_runs_are_taken_over_without_being_run(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("fedalt.cli.jobs.run_all", nobody)
    out, file = tmp_path / "out", tmp_path / "cells.jsonl"
    shutil.copytree(whole / "out", out)
    fedit = (whole / "cells.jsonl").read_text().splitlines()[0]
    file.write_text(f"{fedit}\n")
    words = ("--out", out, "--results", file, "--quiet")
    assert call("compare", whole / "methods.toml", *words) == 0
    assert file.read_text() == (whole / "cells.jsonl").read_text()


@pytest.mark.slow
def test_a_base_that_was_not_scored_before_the_command_was_stopped_is_scored_later(
    whole, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedalt.cli.jobs.run_all", nobody)
    out, file = tmp_path / "out", tmp_path / "cells.jsonl"
    shutil.copytree(whole / "out", out)
    kept = read_cells(whole / "cells.jsonl")
    for key, cell in kept.items():
        columns = {name: scores for name, scores in cell.scores.items() if name != "base"}
        keep_cell(file, replace(cell, scores=columns if key[0] == "local" else cell.scores))
    assert "base" in kept["local", 0].scores
    words = ("--out", out, "--results", file, "--quiet")
    assert call("compare", whole / "methods.toml", *words) == 0
    assert read_cells(file) == kept
    assert "| base |" in (out / "table.md").read_text()


@pytest.mark.slow
def test_tables_come_from_the_file_alone(whole, tmp_path, capsys):
    for name in ("methods.toml", "cells.jsonl"):
        shutil.copy(whole / name, tmp_path / name)  # neither runs nor data nor a base model
    words = ("compare", tmp_path / "methods.toml", "--results", tmp_path / "cells.jsonl")
    capsys.readouterr()
    assert call(*words) == 0
    said = capsys.readouterr()
    assert "gap to the best, local (95 %)" in said.out
    assert " to " in said.out  # from one end of an interval to the other
    assert "A client takes 3 optimiser steps with every method" in said.err
    assert call(*words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    cells = read_cells(whole / "cells.jsonl")
    own = cells["fedit", 0].scores["own"]["a"]["loss"]
    assert shown["losses"]["clients"]["a"]["scores"]["fedit"] == own
    (tmp_path / "methods.toml").write_text(FILE.replace("seeds = [0]", "seeds = [0, 1]"))
    assert call(*words) == 2
    said = capsys.readouterr().err
    assert "has no cell 'fedit', seed 1; with --out it is run" in said
    assert "no method" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("lr = 1e-2", "lr = 2e-2", "[training] lr was 0.01, is 0.02"),
        ("rank = 2", "rank = 3", "[method] rank was 2, is 3"),
        ("rounds = 1", "rounds = 2", "[rounds] rounds was 1, is 2"),
    ],
)
def test_a_cell_of_other_settings_is_refused_by_name(whole, tmp_path, capsys, old, new, complaint):
    file = tmp_path / "methods.toml"
    file.write_text(FILE.replace(old, new))
    assert call("compare", file, "--results", whole / "cells.jsonl") == 2
    said = capsys.readouterr().err
    assert f"the cell 'fedit', seed 0 was made with other settings: {complaint}" in said
    assert "take another --results file, or delete the cell's line" in said


@pytest.mark.slow
def test_elsewhere_the_same_data_and_code_fit_and_others_are_refused(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fedalt.cli.jobs.run_all", nobody)
    there = {cell.method: cell.rehearsal for cell in read_cells(whole / "cells.jsonl").values()}
    by = [1.0]

    def rehearsed(settings, *, classifier):
        name = "local" if "Local" in type(settings.method).__name__ else "fedit"
        return [number * by[0] for number in there[name]]

    monkeypatch.setattr("fedalt.runs.origin.rehearse", rehearsed)
    for name in ("data", "model"):
        shutil.copytree(whole / name, tmp_path / name)
    shutil.copy(whole / "methods.toml", tmp_path)
    words = ("compare", tmp_path / "methods.toml", "--out", tmp_path / "out")
    words = (*words, "--results", whole / "cells.jsonl", "--quiet")
    assert call(*words) == 0
    by[0] = 1 + 1e-5  # another machine
    assert call(*words) == 0
    by[0] = 1.01
    assert call(*words) == 2
    said = capsys.readouterr().err
    assert "the cell 'fedit', seed 0 was made by code (fedalt" in said
    assert "of the method's rehearsal, its number 1 was" in said
    by[0] = 1.0
    data = tmp_path / "data" / "a.test.jsonl"
    data.write_text(data.read_text().replace("yes", "no", 1))
    assert call(*words) == 2
    assert "[data] fingerprint was" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_file_of_cells_is_one_error_with_its_line(whole, tmp_path):
    file, lines = tmp_path / "cells.jsonl", (whole / "cells.jsonl").read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(StoreError, match="line 3 is a second cell 'fedit', seed 0"):
        read_cells(file)
    file.write_text("\n".join([lines[0], lines[1][:-9]]))
    with pytest.raises(StoreError, match="line 2"):
        read_cells(file)
    cells = read_cells(whole / "cells.jsonl")
    for key in reversed(cells):  # in whatever order they are finished
        keep_cell(tmp_path / "again.jsonl", cells[key])
    assert (tmp_path / "again.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scores": {}}, "scores: own: expected clients with a loss each"),
        ({"scores": {"own": {}}}, "scores: own: expected clients with a loss each"),
        ({"scores": {"own": {"a": {"accuracy": 1}}}}, "scores: own: expected clients with a loss"),
        ({"costs": {}}, "costs: it lacks 'download_bytes'"),
        ({"costs": {**asdict(CELL.costs), "seconds": "many"}}, "costs: seconds: expected a number"),
        ({"costs": {**asdict(CELL.costs), "ranks": [8]}}, "costs: ranks: expected a list of 2"),
        ({"costs": {**asdict(CELL.costs), "trained": None}}, "costs: trained: expected an object"),
    ],
)
def test_a_cell_that_was_edited_by_hand_is_one_error_with_its_line(change, told, tmp_path):
    keep_cell(tmp_path / "cells.jsonl", CELL)
    line = json.loads((tmp_path / "cells.jsonl").read_text())
    (tmp_path / "cells.jsonl").write_text(json.dumps({**line, **change}) + "\n")
    with pytest.raises(StoreError, match=f"is damaged: line 1: {told}"):
        read_cells(tmp_path / "cells.jsonl")


def test_cells_that_several_processes_keep_in_one_file_are_all_there(tmp_path):
    file, cell = tmp_path / "cells.jsonl", CELL
    program = (
        "import sys; from pathlib import Path; from dataclasses import asdict, replace\n"
        "from fedalt.runs.cells import keep_cell, read_cells\n"
        "file, label = Path(sys.argv[1]), sys.argv[2]\n"
        "cell = read_cells(file)['local', 0]\n"
        "for seed in range(30):\n"
        "    keep_cell(file, replace(cell, method=label, seed=seed))\n"
    )
    keep_cell(file, cell)
    running = [subprocess.Popen([sys.executable, "-c", program, file, label]) for label in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    added = [(label, seed) for label in "ab" for seed in range(30)]
    assert list(read_cells(file)) == [*added, cell.key]


def test_a_run_that_other_code_began_does_not_go_on(tmp_path):
    job = Job(None, 0, tmp_path / "fedit" / "seed-0")
    note_origin(job, [1.0, 2.0])
    note_origin(job, [1.0, 2.0001])
    with pytest.raises(StoreError, match=r"begun by code .* its number 2 was 2 and is 2\.1"):
        note_origin(job, [1.0, 2.1])


def test_compare_asks_for_a_folder_or_a_file(tmp_path, capsys):
    assert call("compare", tmp_path / "methods.toml") == 2
    assert "give --out, a folder to run in, or --results" in capsys.readouterr().err


def settings(**method):
    return settings_of({"data": {"path": "/nowhere"}, "method": method}, "a test")


def test_a_rehearsal_is_the_same_every_time_and_shows_what_a_method_does(monkeypatch):
    first = rehearse(settings(name="fedit"), classifier=False)
    assert rehearse(settings(name="fedit", alpha=99.0), classifier=False) == first
    # 3 clients, 4 rounds; then loss and accuracy of each client's own model and the shared part.
    assert len(first) == 3 * 4 + 3 * 4
    other = rehearse(settings(name="fedit", weighting="examples"), classifier=False)
    assert "number 4 " in difference(first, other)  # the first that an average has changed
    monkeypatch.setattr(
        "fedalt.methods.fedit.weighted_mean",
        lambda replies: {name: 0.98 * each for name, each in weighted_mean(replies).items()},
    )
    assert difference(first, rehearse(settings(name="fedit"), classifier=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_rehearsed(name):
    assert len(rehearse(settings(name=name), classifier=False)) >= 3 * 4 + 3 * 2


def test_clients_whom_settings_name_take_part_in_a_rehearsal():
    ranks = {"zoe": 1, "yan": 3}
    own = rehearse(settings(name="owner_mean", ranks=ranks), classifier=False)
    assert difference(own, rehearse(settings(name="owner_mean"), classifier=False))


def test_who_joins_a_run_has_no_part_in_a_rehearsal():
    table = {"data": {"path": "."}, "method": {"name": "fedit"}, "clients": {"zoe": {"joins": 2}}}
    joining = rehearse(settings_of(table, "a test"), classifier=False)
    assert joining == rehearse(settings(name="fedit"), classifier=False)


def test_a_classifier_is_rehearsed_as_one_and_searches_with_its_labels():
    assert len(rehearse(settings(name="fdlora"), classifier=True)) >= 18


def test_rehearsals_agree_up_to_rounding():
    assert difference([1.0, 0.25], [1.0005, 0.25]) == ""
    assert difference([1.0, 0.25], [1.0, 0.26]) == "its number 2 was 0.25 and is 0.26"
    assert difference([1.0], [1.0, 2.0]) == "it had 1 numbers and has 2"


def test_a_cell_of_before_an_ablation_had_a_switch_has_its_default(tmp_path):
    def origin(**switches):
        method = {"name": "fedalt", "gate": "half", **switches}
        settings = settings_of({"data": {"path": "."}, "method": method}, "a test")
        return Origin(that_count(settings))

    now, file = origin(), tmp_path / "cells.jsonl"
    method = {key: value for key, value in now.settings["method"].items() if key != "freeze_a"}
    cell = Cell("half", 0, "0", {**now.settings, "method": method}, [], Cost(0, 0, 0, 0, 0), {})
    now.require(cell, file)
    # A default that was written out, and is left out now, is the same one.
    plain = settings_of({"data": {"path": "."}, "method": {"name": "fedalt"}}, "a test")
    spelt = {**that_count(plain)["method"], "freeze_a": False}
    cell_of_spelt = replace(cell, settings={**that_count(plain), "method": spelt})
    Origin(that_count(plain)).require(cell_of_spelt, file)
    with pytest.raises(StoreError, match=r"\[method\] freeze_a was False, is True"):
        origin(freeze_a=True).require(cell, file)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_rehearsal_with_privacy_is_repeatable(unit):
    pytest.importorskip("dp_accounting")
    table = {
        "data": {"path": "."},
        "method": {"name": "fedalt", "rank": 2},
        "rounds": {"rounds": 2, "select": "last"},
        "privacy": {"unit": unit, "noise": 1.0, "clip": 0.5},
    }
    settings = settings_of(table, "a test")
    assert rehearse(settings, classifier=False) == rehearse(settings, classifier=False)
