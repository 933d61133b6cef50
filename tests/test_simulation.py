"""The federation in Flower's simulation, on Ray."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from runs_for_tests import save_model, settings_for, write_clients

from fedalt.codec import read
from fedalt.prepare import prepare
from fedalt.runs import start_run
from fedalt.settings import Settings, to_toml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]
COMMAND = [sys.executable, "-m", "fedalt", "simulate", "--engine", "flower"]


def a_run(folder: Path) -> tuple[Settings, list[str]]:
    """Settings of a small run, and the command that simulates it."""
    model = save_model(folder / "model")
    rounds = {"rounds": 2, "test": False}
    settings = settings_for(model, write_clients(folder / "data"), rounds=rounds)
    file = folder / "settings.toml"
    file.write_text(to_toml(settings))
    return settings, [*COMMAND, str(file), "--out", str(folder / "out")]


def test_simulated_it_has_the_numbers_of_one_process(tmp_path: Path) -> None:
    settings, command = a_run(tmp_path)
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
