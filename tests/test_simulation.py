"""The federation in Flower's simulation, on Ray."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from federations import Wire
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from runs_for_tests import save_model, settings_for, write_clients

from fedalt.core.codec import read
from fedalt.core.files import atomic_write
from fedalt.engine.firewall import Screening
from fedalt.federation.rules import Rules
from fedalt.federation.server_folder import open_server
from fedalt.flower import simulate
from fedalt.flower.message_content import bytes_of, content_of
from fedalt.runs.budget import LEDGER
from fedalt.runs.folder import StoreError, locked, open_run
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


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_simulated_client_protects_what_it_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    for number in ("_task_id", "_run_id", "_node_id"):  # as one of Ray's processes has them
        monkeypatch.setattr(TaskIdentity, number, 1)
    schedule = {"rounds": 2, "select": "last", "test": False}
    privacy = {"unit": unit, "epsilon": 8.0, "clip": 0.1, "seed": 3}
    data = write_clients(tmp_path / "data")
    model = save_model(tmp_path / "model")
    settings = settings_for(model, data, rounds=schedule, privacy=privacy)
    folder = tmp_path / "out"
    folder.mkdir()
    terms = simulate._terms(settings, folder)
    atomic_write(folder / "settings.toml", to_toml(settings).encode())
    nodes: dict[str, Any] = {
        client_id: _Node(simulate._answer_in(folder), place)
        for place, client_id in enumerate(terms.clients)
    }
    host = open_server(terms, folder / "run", Wire(nodes), Rules(), Screening(), print)
    host.to_the_end()
    start_run(prepare(settings), tmp_path / "whole")
    for client_id in terms.clients:
        there = folder / "members" / client_id
        assert (there / LEDGER).exists() == (unit == "example")
        here = tmp_path / "whole" / "clients" / client_id / "0001.safetensors"
        mine = read(settings.method.client_state, there / "clients" / client_id / here.name)
        for name, tensor in read(settings.method.client_state, here).individual.items():
            torch.testing.assert_close(mine.individual[name], tensor, rtol=1e-4, atol=1e-6)
    apart, whole = (_spent_in(each) for each in (folder / "run", tmp_path / "whole"))
    assert apart == pytest.approx(whole)


def _spent_in(folder: Path) -> list[float]:
    return [line["epsilon"] for line in open_run(folder).lines() if line["kind"] == "round"]


def test_nobody_leaves_by_hand_while_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Host:
        def __init__(self, _: object, run: Path, *__: object) -> None:
            self.run = run

        def to_the_end(self) -> None:
            with locked(self.run):  # as `fedalt leave` does
                pass

    settings = settings_for(save_model(tmp_path / "model"), write_clients(tmp_path / "data"))
    terms = simulate._terms(settings, tmp_path)
    monkeypatch.setattr(simulate, "_nodes_by_client", lambda *_: {})
    monkeypatch.setattr(simulate, "open_server", Host)
    with pytest.raises(StoreError, match="another process is using"):
        simulate._serve(terms, tmp_path, None, print)


@dataclass
class _Node:
    """A node of Flower's simulation, without its process."""

    app: Any
    place: int

    def answer(self, data: bytes) -> bytes:
        about = {"partition-id": self.place}
        context = Context(0, 0, about, RecordDict(), {})
        call = Message(content_of(data), dst_node_id=1, message_type=MessageType.TRAIN)
        return bytes_of(self.app(call, context).content)


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
