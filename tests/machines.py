"""A federation of real processes on this machine, and what can be done to them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from runs_for_tests import scores_of, settings_for, write_clients

from fedalt.core.codec import decode, encode, read
from fedalt.engine.states import server_of
from fedalt.federation.messages import NEVER, Answer, Call, digest
from fedalt.federation.transport import Lost
from fedalt.flower.init import create_federation
from fedalt.flower.processes import free_port
from fedalt.runs.checkpoints import FileLedger
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import start_run
from fedalt.runs.settings import Settings
from fedalt.runs.setup import prepare

PATIENCE = 240.0  # seconds, on a busy machine


@dataclass
class Machines:
    """The folders of a federation and the processes that were started for them."""

    root: Path
    address: str
    settings: Settings  # of a run in one process on the same data
    clients: tuple[str, ...]
    started: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)  # in place of `fedalt client`
    server_name: str = "server"

    @property
    def server(self) -> Path:
        """The server's folder."""
        return self.root / self.server_name

    @property
    def run(self) -> Path:
        """What the federation has learnt."""
        return self.server / "state" / "run"

    def client(self, name: str) -> Path:
        """A client's folder."""
        return self.root / "clients" / name

    def start(self, name: str, *words: str, **environment: str) -> "subprocess.Popen[bytes]":
        """`fedalt server` or, by its name, `fedalt client`; its output goes to NAME.out."""
        file = self.server / "federation.toml"
        command = ["-m", "fedalt", "server", "--config", str(file)]
        if name != "server":
            file = self.client(name) / "client.toml"
            command = self.commands.get(name, ["-m", "fedalt", "client", "--config", str(file)])
        with (self.root / f"{name}.out").open("ab") as output:
            self.started[name] = subprocess.Popen(
                [sys.executable, *command, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        return self.started[name]

    def said(self, name: str) -> str:
        """What a process has printed up to now."""
        file = self.root / f"{name}.out"
        return file.read_text() if file.exists() else ""

    def rounds_done(self) -> int:
        """How many rounds count."""
        file = self.run / "progress.json"
        return json.loads(file.read_text())["rounds_done"] if file.exists() else 0

    def answered(self, round_: int) -> list[str]:
        """Whose answers of a round have come to the server."""
        return sorted(p.stem for p in (self.run / "incoming" / f"{round_:04d}").glob("*.bin"))

    def processes(self) -> list[psutil.Process]:
        """Whatever runs for one of the folders, Flower's processes among them."""
        return [each for each in psutil.process_iter() if self._is_ours(each)]

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.pid == os.getpid():
            return False
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            words = [*process.cmdline(), process.environ().get("FLWR_HOME", "")]
        except psutil.Error:
            return False
        return any(str(self.root) in word for word in words)

    def find(self, *words: str) -> psutil.Process:
        """The one process in whose command line all these words are; it is waited for."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = []
            for each in self.processes():
                line = " ".join(_words(each))
                if all(word in line for word in words):
                    found.append(each)
            return len(found) == 1

        wait_for(there, f"one process with {words}")
        return found[0]

    def app(self) -> psutil.Process:
        """The process that calls clients and aggregates."""
        file = self.server / "state" / "app.pid"

        def alive() -> bool:
            return file.exists() and psutil.pid_exists(int((file.read_text() or "0").split()[0]))

        wait_for(alive, "the app")
        return psutil.Process(int(file.read_text().split()[0]))

    def process(self, name: str) -> psutil.Process:
        """What `start` has started last for a name."""
        return psutil.Process(self.started[name].pid)

    def superlink(self) -> psutil.Process:
        """Flower's server."""
        return self.find("flower-superlink", "--host")

    def gateway(self) -> psutil.Process:
        """What listens to the outside."""
        return self.find("fedalt.flower.gateway")

    def fleet_client(self, name: str) -> psutil.Process:
        """What connects a client to the server."""
        return self.find("fedalt.flower.fleet_client", str(self.client(name)))

    def wait_for_round(self, number: int) -> None:
        """Wait until so many rounds count."""
        self.wait_for(lambda: self.rounds_done() >= number, f"round {number}")

    def wait_for(self, true: Callable[[], bool], what: str) -> None:
        """Wait for something while nobody gives up."""

        def looked() -> bool:
            for name, process in self.started.items():
                if process.poll() not in (None, 0, -signal.SIGKILL, 130):
                    raise AssertionError(f"{name} has ended by itself:\n{self.said(name)}")
            return true()

        wait_for(looked, what, lambda: self.said("server"))

    def wait_for_end(self, names: Sequence[str]) -> dict[str, int]:
        """Exit codes once all of these have ended."""
        end = time.monotonic() + PATIENCE
        for name in names:
            try:
                self.started[name].wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                said = "\n".join(f"--- {each}\n{self.said(each)}" for each in ("server", name))
                raise AssertionError(f"{name} does not end\n{said}") from None
        return {name: self.started[name].returncode for name in names}

    def kill_all(self) -> None:
        """As if the power went: nobody can do anything any more."""
        while found := self.processes():
            for each in found:
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(found, timeout=10)
        for process in self.started.values():
            process.wait()


def found(
    root: Path, model: Path, clients: Sequence[str], *, count: int = 12, **sections: dict[str, Any]
) -> Machines:
    """Make a federation and put each client's data into its folder."""
    settings = settings_for(model, write_clients(root / "all", clients, count), **sections)
    address = f"127.0.0.1:{free_port()}"
    place = root / "federation"
    create_federation(place, clients, prepare(settings).parts, name="drill", address=address)
    for each in clients:
        write_clients(place / "clients" / each / "data", [each], count)
    return Machines(place, address, settings, tuple(clients))


class Relay:
    """A wire between a client and the server that can be cut."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.inner = host, int(port)
        self.is_cut = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: set[socket.socket] = set()
        threading.Thread(target=self._listen, daemon=True).start()

    def cut(self) -> None:
        """End what goes through it, and take nothing more."""
        self.is_cut = True
        for each in list(self.open):
            _shut(each)

    def mend(self) -> None:
        """As it was."""
        self.is_cut = False

    def _listen(self) -> None:
        while True:
            outer, _ = self.listener.accept()
            if self.is_cut:
                outer.close()
                continue
            try:
                inner = socket.create_connection(self.inner, 10)
            except OSError:
                outer.close()
                continue
            inner.settimeout(None)
            self.open |= {outer, inner}
            for one, other in ((outer, inner), (inner, outer)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(2**16):
                other.sendall(data)
        for each in (one, other):
            _shut(each)
            self.open.discard(each)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def wait_for(
    true: Callable[[], bool], what: str, said: Callable[[], str] = lambda: "", every: float = 0.02
) -> None:
    """Wait until something is true; AssertionError if it takes too long."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"waited in vain for {what}\n{said()}")
        time.sleep(every)


def kill(process: psutil.Process) -> None:
    """As the kernel does where memory is short."""
    process.kill()


def newest_state(folder: Path, client_id: str, cls: type) -> tuple[str, Any]:
    """The file name and content of the last state that a client has kept."""
    file = max((folder / "clients" / client_id).glob("*.safetensors"))
    return file.name, read(cls, file)


@dataclass
class Wire:
    """Carries bytes between a host and members of this process, who never are away.

    `left_out` are pairs of round and client: such a client says that it cannot.
    """

    members: Mapping[str, Any]
    left_out: Collection[tuple[int, str]] = ()
    waiting: list[tuple[str, bytes]] = field(default_factory=list)

    def online(self) -> frozenset[str]:
        """Everyone, always."""
        return frozenset(self.members)

    def send(self, calls: Iterable[tuple[str, bytes]]) -> None:
        """Leave calls."""
        self.waiting += calls

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        """Have all calls answered."""
        calls, self.waiting = self.waiting, []
        return [(client_id, self._answer(client_id, data)) for client_id, data in calls]

    def _answer(self, client_id: str, data: bytes) -> bytes:
        call = decode(Call, data)
        if call.train and (call.round, client_id) in self.left_out:
            about = call.federation, call.terms, client_id, call.round, NEVER, digest(data)
            return encode(Answer(*about, error="left out"))
        answer: bytes = self.members[client_id].answer(data)
        return answer


def assert_close(one: Any, other: Any) -> None:
    """Equal trees to a relative 1e-4, everything else the same."""
    for name, value in vars(one).items():
        theirs = vars(other)[name]
        if isinstance(value, dict):
            assert value.keys() == theirs.keys()
            for each in value:
                torch.testing.assert_close(value[each], theirs[each], rtol=1e-4, atol=1e-6)
        elif isinstance(value, FileLedger):
            assert value.clients() == theirs.clients()
            for each in value.clients():
                assert_close(value[each], theirs[each])
        elif is_dataclass(value):
            assert_close(value, theirs)
        else:
            assert value == theirs


def assert_as_in_one_process(
    machines: Machines, run: Path, splits: Collection[str] = ("validation", "test")
) -> None:
    """The states of server and clients, and scores, are those of a run in one process.

    States to a relative 1e-4 (and an absolute 1e-6), scores to a relative 1e-4.
    """
    settings = machines.settings
    prepared = prepare(settings)
    start_run(prepared, run)
    for each in machines.clients:
        place = machines.client(each) / "state"
        name, mine = newest_state(place, each, settings.method.client_state)
        wanted, theirs = newest_state(run, each, settings.method.client_state)
        assert name == wanted
        assert_close(mine, theirs)
    done = open_run(run).progress().rounds_done
    assert_close(
        *(
            server_of(settings.method, prepared.parts.init, open_run(each).states("own", done))
            for each in (machines.run, run)
        )
    )
    apart, whole = (
        {
            (line["split"], line["round"], line["client"], line["column"]): line["metrics"]
            for line in scores_of(folder)
            if line["kind"] == "score" and line["split"] in splits
        }
        for folder in (machines.run, run)
    )
    assert apart.keys() == whole.keys()
    for key, metrics in whole.items():
        assert apart[key] == pytest.approx(metrics, rel=1e-4)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
