"""A run in several processes has the numbers of one, whatever is killed on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import pytest
import torch
from commands import call
from runs_for_tests import adapters_of, save_model, scores_of, settings_for, write_clients

from fedalt.prepare import prepare, require_room
from fedalt.processes import ProcessError, _Leader
from fedalt.runs import resume_run, start_run
from fedalt.settings import SettingsError, to_toml
from fedalt.spread import processes_for, suited
from fedalt.store import open_run
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
    training = {"pass_tokens": 1, **training}
    if processes is not None:
        training["processes"] = processes
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


@dataclass(frozen=True)
class At:
    """A watcher who does something at the first event of a kind."""

    what: str
    act: Callable[[], None]

    def hear(self, event):
        if event.what == self.what:
            self.act()

    def wrote(self, line):
        pass


@pytest.mark.slow  # here and below: a process imports for seconds before it works
@pytest.mark.parametrize("method", ["fedlease", "pf2lora"])
def test_two_processes_have_the_numbers_of_one(places, straight, tmp_path, method):
    start_run(run_of(places, method, 2, carry_optimizer=True), tmp_path / "run")
    assert_same(tmp_path / "run", straight(method))
    assert not psutil.Process().children()


@pytest.mark.long
def test_a_killed_process_ends_the_run_which_goes_on(places, straight, tmp_path, capfd):
    prepared, run = run_of(places, processes=2, carry_optimizer=True), tmp_path / "run"

    def kill():
        (other,) = psutil.Process().children()
        other.kill()

    with pytest.raises(ProcessError, match=r"^process 2/2 \(pid \d+\) was killed"):
        start_run(prepared, run, At("validate", kill))
    assert not psutil.Process().children()
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
    (other,) = psutil.Process(first.pid).children()
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
    other = "^process 2/2: client 'b', round 0: the loss became nan"
    with pytest.raises(TrainingError, match=other):
        start_run(prepared, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 4),
        ({"threads": 2}, 2),
        ({"passes": 3}, 3),
        ({"passes": 0}, 1),
        ({"operations": 1e13}, 1),  # over before another process has started
        ({"model_bytes": 7e9}, 2),
        ({"model_bytes": 2e10}, 1),
        ({"threads": 64, "passes": 1000, "memory": 1e12}, 8),
    ],
)
def test_a_run_is_spread_over_what_it_can_use(change, expected):
    usual = {"threads": 4, "passes": 9, "operations": 1e14, "model_bytes": 1e8, "memory": 3.3e10}
    assert suited(**{**usual, **change}) == expected


def test_a_run_that_says_nothing_is_spread_if_it_is_long(places, monkeypatch):
    assert processes_for(run_of(places, processes=3)) == 3
    assert processes_for(run_of(places, processes=None)) == 1  # it takes a second
    monkeypatch.setattr("fedalt.spread._WORTH", 1e-9)
    long = run_of(places, processes=None)
    assert processes_for(long) == 2
    monkeypatch.setattr("fedalt.spread.sys.platform", "darwin")  # where nobody has tried it
    assert processes_for(long) == 1


@pytest.mark.slow
def test_the_processes_of_a_run_that_says_nothing_have_the_numbers_of_one(
    places, straight, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedalt.spread._WORTH", 1e-9)
    monkeypatch.setattr(_Leader, "joined", when_others_are_ready := JoinsAfter(groups=3))
    start_run(run_of(places, processes=None, carry_optimizer=True), tmp_path / "run")
    assert when_others_are_ready.outcomes[:4] == [False, False, False, True]
    assert_same(tmp_path / "run", straight("fedalt"))


class JoinsAfter:
    """The others are not looked for before so many groups are done, and then waited for."""

    def __init__(self, groups):
        self.groups, self.outcomes, self.joined = groups, [], _Leader.joined

    def __get__(self, leader, _):
        return lambda: self(leader)

    def __call__(self, leader):
        outcome = False
        while len(self.outcomes) >= self.groups and not (outcome := self.joined(leader)):
            time.sleep(0.05)
        self.outcomes.append(outcome)
        return outcome


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
