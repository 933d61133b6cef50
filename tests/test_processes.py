"""A run in several processes has the numbers of one, whatever is killed on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
import pytest
import torch
from commands import call
from runs_for_tests import adapters_of, save_model, scores_of, settings_for, write_clients

from fedalt.engine.workers import WorkerError
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import resume_run, start_run
from fedalt.runs.preflight import require_room
from fedalt.runs.settings import SettingsError, to_toml
from fedalt.runs.setup import prepare
from fedalt.training.group import TrainingError


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    return save_model(folder / "model"), write_clients(folder / "data", ("a", "b", "c", "d"))


@pytest.fixture(autouse=True)
def two_threads():
    """What two processes share."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_of(places, method="fedalt", processes=1, **training):
    """A client a pass, so that each process has work."""
    training = {"pass_tokens": 1, "processes": processes, **training}
    table = {"training": training, "method": {"name": method}, "rounds": {"rounds": 3}}
    return prepare(settings_for(*places, **table))


@pytest.fixture(scope="module")
def straight(places, tmp_path_factory):
    """A method's undisturbed run in one process, with as many threads as each of two has."""
    folder = tmp_path_factory.mktemp("straight")

    def run(method):
        if not (folder / method).exists():
            torch.set_num_threads(1)
            start_run(run_of(places, method, carry_optimizer=True), folder / method)
            torch.set_num_threads(2)
        return folder / method

    return run


def assert_same(run, expected):
    assert adapters_of(run) == adapters_of(expected)
    assert scores_of(run) == scores_of(expected)
    assert (run / "examples.jsonl").read_bytes() == (expected / "examples.jsonl").read_bytes()


def workers_of(pid):
    """The processes that work for another; multiprocessing keeps one of its own beside them."""
    workers = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # it has ended, and nobody has asked how
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


@dataclass(frozen=True)
class At:
    """A watcher who does something at the first event of a kind."""

    what: str
    act: Callable[[], None]

    def on_event(self, event):
        if event.what == self.what:
            self.act()

    def on_record(self, line):
        pass


@pytest.mark.slow  # here and below: a process imports for seconds before it works
@pytest.mark.parametrize("method", ["fedlease", "pf2lora"])
def test_two_processes_have_the_numbers_of_one(places, straight, tmp_path, method):
    start_run(run_of(places, method, 2, carry_optimizer=True), tmp_path / "run")
    assert_same(tmp_path / "run", straight(method))
    assert not workers_of(os.getpid())


@pytest.mark.long
def test_a_killed_process_ends_the_run_which_goes_on(places, straight, tmp_path, capfd):
    prepared, run = run_of(places, processes=2, carry_optimizer=True), tmp_path / "run"

    def kill():
        for worker in workers_of(os.getpid()):  # none is left when the next event comes
            worker.kill()

    with pytest.raises(WorkerError, match=r"^a worker process has ended before its work"):
        start_run(prepared, run, At("validate", kill))
    assert not workers_of(os.getpid())
    assert call("resume", run, "--quiet") == 0
    assert_same(run, straight("fedalt"))
    assert "error" not in capfd.readouterr().err


@pytest.mark.long
def test_a_run_whose_processes_were_all_killed_goes_on_with_one(places, straight, tmp_path):
    file, run = tmp_path / "settings.toml", tmp_path / "run"
    settings = run_of(places, processes=2, carry_optimizer=True).parts.settings
    file.write_text(to_toml(settings))
    first = subprocess.Popen(
        [sys.executable, "-m", "fedalt", "run", file, "--out", run, "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    while not (run / "progress.json").exists():
        assert first.poll() is None
        time.sleep(0.005)
    (other,) = workers_of(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    psutil.wait_procs([other], timeout=5)
    assert not other.is_running(), "it has outlived the first process"
    assert 0 < open_run(run).rounds_done() < 3
    torch.set_num_threads(1)
    resume_run(run_of(places, carry_optimizer=True), run)
    assert_same(run, straight("fedalt"))


@pytest.mark.long
def test_training_that_fails_in_another_process_is_told_with_its_client(places, tmp_path):
    data = write_clients(tmp_path / "data", ["a"], count=4)  # one step, which does no harm yet
    write_clients(data, ["b"])
    prepared = run_of((places[0], data), processes=2, lr=1e30)
    other = "^in a worker process: client 'b', round 1: the loss became nan"
    with pytest.raises(TrainingError, match=other):
        start_run(prepared, tmp_path / "run")


def test_what_has_no_room_for_several_processes_is_refused(places):
    plain = settings_for(*places, training={"processes": 3})

    def settings(**model):
        return replace(plain, model=replace(plain.model, **model))

    require_room(settings(device="cuda"), gpus=3)
    require_room(settings(device="cpu"), gpus=0)
    for model, why in (
        ({"device": "cuda"}, "the number of GPUs is 2"),
        ({"device": None}, "the number of GPUs is 2"),
        ({"device": "cuda:1"}, "not for device='cuda:1'"),
        ({"device": "cuda", "quantise": "4bit"}, "quantised"),
    ):
        with pytest.raises(SettingsError, match=rf"processes=3.*{why}"):
            require_room(settings(**model), gpus=2)


def test_no_process_at_all_is_refused(places, tmp_path, capsys):
    _, data = places
    assert call("run", "--data", data, "--out", tmp_path / "run", "--processes", 0) == 2
    assert "[training]: processes=0, but it is at least 1" in capsys.readouterr().err
