"""What trackers have of a run is what its record says, each number once."""

import json
import shutil
import socket
import sqlite3
import threading
from collections import Counter
from dataclasses import dataclass

import pytest
from commands import call
from runs_for_tests import settings_for

from fedalt.report.numbers import numbers_of, step_of
from fedalt.report.trackers import TRACKERS, TrackerName, tracking
from fedalt.runs.folder import locked, open_run
from fedalt.runs.lifecycle import new_run, resume_run
from fedalt.runs.observer import Observers
from fedalt.runs.setup import prepare

BOTH = ("--report-to", "tensorboard", "--report-to", "trackio")


@dataclass(frozen=True)
class StopsAt:
    """A watcher who interrupts the run at one event."""

    what: str
    round: int

    def on_event(self, event):
        if (event.what, event.round) == (self.what, self.round):
            raise KeyboardInterrupt

    def on_record(self, line):
        pass


def recorded(run):
    """Every number of a record by name and round, and how often it is there: once."""
    lines = open_run(run).lines()
    return {(name, step_of(line)): value for line in lines for name, value in numbers_of(line)}


def in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [
        (tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)
    ]
    assert max(Counter(each[:2] for each in found).values()) == 1
    return {(tag, step): value for tag, step, value in found}


def in_trackio(folder, where="1 = 1"):
    with sqlite3.connect(folder / "fedalt.db") as store:
        rows = store.execute(f"select step, metrics from metrics where {where}").fetchall()
    found = [(tag, step, value) for step, row in rows for tag, value in json.loads(row).items()]
    assert max(Counter(each[:2] for each in found).values()) == 1
    return {(tag, step): value for tag, step, value in found}


def test_every_tracker_has_an_adapter():
    assert TRACKERS.keys() == set(TrackerName)


@pytest.mark.parametrize("name", TrackerName)
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    name, run_flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fedalt.report.trackers.find_spec", lambda _: None)
    assert call("run", *run_flags, "--report-to", name, "--out", tmp_path / "r") == 2
    assert f"pip install 'fedalt[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_trackers_get_every_number_and_sending_again_replaces_it(run_flags, tmp_path, capsys):
    run = tmp_path / "r"
    assert call("run", *run_flags, "--rounds", 2, *BOTH, "--out", run, "-q") == 0
    expected = recorded(run)
    assert ("train/loss/own/a", 1) in expected
    assert any(name.startswith("test/rougeL/local") for name, _ in expected)
    assert 0 < expected["validation/weight_of_individual/own/b", 1] < 1
    for _ in range(2):
        assert in_tensorboard(run) == pytest.approx(expected)
        assert in_trackio(run / "trackio") == expected
        assert call("track", run, *BOTH) == 0
    assert f"{len(open_run(run).lines())} lines sent to tensorboard" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "round_"), [("train", 1), ("test", 1)])
def test_a_run_that_goes_on_is_not_written_twice(
    tiny_model_dir, clients_dir, tmp_path, what, round_
):
    run = tmp_path / "run"
    rounds = {"rounds": 2, "select": "last"}
    prepared = prepare(settings_for(tiny_model_dir, clients_dir, rounds=rounds))
    new_run(prepared, run)
    stop = StopsAt(what, round_)
    with pytest.raises(KeyboardInterrupt), tracking(run, TrackerName, []) as trackers:
        resume_run(prepared, run, Observers([*trackers, stop]))
    assert in_trackio(run / "trackio") == recorded(run)  # no more than what counts
    assert call("resume", run, *BOTH, "--quiet") == 0
    assert in_tensorboard(run) == pytest.approx(recorded(run))
    assert in_trackio(run / "trackio") == recorded(run)


def test_trackio_asks_nobody_and_keeps_the_runs_of_others(finished_run, tmp_path, monkeypatch):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                asked.append(connection.recv(1000))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.delenv("HF_HUB_OFFLINE")
        for name, value in (
            ("TRACKIO_DIR", str(tmp_path / "all")),
            ("TRACKIO_SERVER_URL", f"{url}/?write_token=x"),
            ("HF_ENDPOINT", url),
            ("HF_TOKEN", "hf_of_nobody"),
        ):
            monkeypatch.setenv(name, value)
        here, there = (tmp_path / place / "same-name" for place in ("here", "there"))
        for run in (here, there):
            shutil.copytree(finished_run, run)
        for run in (here, there, here):
            assert call("track", run, "--report-to", "trackio") == 0
    assert asked == []
    assert not (here / "trackio").exists()
    with sqlite3.connect(tmp_path / "all" / "fedalt.db") as store:
        runs = dict(store.execute("select run_id, json_extract(config, '$.folder') from configs"))
    assert sorted(runs.values()) == sorted([str(here), str(there)])
    for run_id in runs:
        assert in_trackio(tmp_path / "all", f"run_id = '{run_id}'") == recorded(finished_run)


def test_a_store_that_cannot_be_written_is_one_clear_error(
    finished_run, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file"))
    assert call("track", finished_run, "--report-to", "trackio") == 2
    assert "error: trackio: " in capsys.readouterr().err


def test_a_finished_run_that_is_resumed_says_what_sends_its_numbers(finished_run, capsys):
    assert call("resume", finished_run, "--report-to", "tensorboard") == 2
    assert "`fedalt track` sends its numbers" in capsys.readouterr().err
    assert not (finished_run / "tensorboard").exists()


def test_a_run_that_goes_on_cannot_be_sent_by_another_process(finished_run, capsys):
    with locked(finished_run):
        assert call("track", finished_run, "--report-to", "tensorboard") == 2
    assert "another process is using" in capsys.readouterr().err
    assert not (finished_run / "tensorboard").exists()
