"""The federation in Flower's simulation, on Ray."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from runs_for_tests import save_model, settings_for, write_clients

from fedalt.core.codec import read
from fedalt.runs.lifecycle import start_run
from fedalt.runs.settings import Settings, to_toml
from fedalt.runs.setup import prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]
COMMAND = [sys.executable, "-m", "fedalt", "simulate", "--engine", "flower"]


def a_run(folder: Path, *, rounds: int) -> tuple[Settings, list[str]]:
    """Settings of a small run, and the command that simulates it."""
    model = save_model(folder / "model")
    schedule = {"rounds": rounds, "evaluate_every": rounds, "test": False}
    settings = settings_for(model, write_clients(folder / "data"), rounds=schedule)
    file = folder / "settings.toml"
    file.write_text(to_toml(settings))
    return settings, [*COMMAND, str(file), "--out", str(folder / "out")]


def test_simulated_it_has_the_numbers_of_one_process(tmp_path: Path) -> None:
    settings, command = a_run(tmp_path, rounds=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    start_run(prepare(settings), tmp_path / "run")
    for client_id in ("a", "b", "c"):
        there = tmp_path / "out" / "members" / client_id / "clients" / client_id
        here = tmp_path / "run" / "clients" / client_id / "0001.safetensors"
        mine = read(settings.method.client_state, there / "0001.safetensors")
        theirs = read(settings.method.client_state, here)
        for name, tensor in theirs.individual.items():
            torch.testing.assert_close(mine.individual[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_it_does_not_go_on_without_a_dead_process(tmp_path: Path) -> None:
    _, command = a_run(tmp_path, rounds=500)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        running = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    record = tmp_path / "out" / "run" / "rounds.jsonl"
    while not record.exists():
        assert running.poll() is None, log.read_text()
        time.sleep(0.2)
    below = psutil.Process(running.pid).children(recursive=True)
    actors = [each for each in below if "ClientAppActor" in " ".join(each.cmdline())]
    assert actors
    for each in actors:
        each.send_signal(signal.SIGKILL)
    assert running.wait(timeout=120) == 2
    assert "the same command goes on from here" in log.read_text()
