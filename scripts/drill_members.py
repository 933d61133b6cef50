"""What `scripts/drill.py --members` does: clients come and go, keys change, the server moves."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

from drill_events import Drill
from machines import kill
from runs_for_tests import write_clients

ROUNDS = 20
FIRST = ("a", "b", "c")
ABOUT = {"rounds": {"rounds": ROUNDS}, "training": {"local_epochs": 8}}
BEHIND = 2  # rounds that a restored server has lost
AHEAD = "`fedalt client --go-back` follows it"


def members_drill(drill: Drill) -> list[str]:
    """Two clients added, one removed, one key rotated; the server killed, and once restored."""
    drill.begin()
    drill.hold()
    add(drill, "d")
    rotate_key(drill, "c")
    drill.kill_waiting("fedalt server")
    file = drill.machines.root / "server.tar"
    back_up(drill, file)
    restore(drill, file)
    add(drill, "e")
    drill.kill_aggregating("fedalt server")
    remove(drill, "b")
    return drill.end()


def add(drill: Drill, name: str) -> None:
    """Let a newcomer in while a round goes on."""
    machines = drill.machines
    with drill.event(f"client {name} added") as round_:
        drill.wait_for_others(round_)
        _federation("add", _config(drill), name)
        write_clients(machines.client(name) / "data", [name])
        machines.start(name)
    machines.clients = (*machines.clients, name)


def rotate_key(drill: Drill, name: str) -> None:
    """Give a client another key, in its own folder, while it is connected with the old one."""
    with drill.event(f"key of client {name} rotated", name) as round_:
        drill.wait_for_others(round_)
        _federation("rotate-key", _config(drill), name)


def remove(drill: Drill, name: str) -> None:
    """Take a client out while a round goes on."""
    machines = drill.machines
    with drill.event(f"client {name} removed") as round_:
        drill.wait_for_others(round_)
        _federation("remove", _config(drill), name)
        machines.started.pop(name).terminate()
        machines.clients = tuple(other for other in machines.clients if other != name)


def back_up(drill: Drill, file: Path) -> None:
    """Stop the server for a backup, and let it do two more rounds."""
    machines = drill.machines
    with drill.event("server stopped for a backup") as round_:
        machines.started["server"].send_signal(signal.SIGTERM)
        machines.wait_for_end(["server"])
        _federation("backup", _config(drill), file)
        machines.start("server")
    drill.go()
    machines.wait_for_round(round_ + BEHIND)
    drill.hold()


def restore(drill: Drill, file: Path) -> None:
    """Lose the server and restore it in another place; its clients are ahead of it.

    Each says so and changes nothing, until its owner lets it go back. The server is started again
    in between: it would go on without those who have told it that they cannot.
    """
    machines = drill.machines
    with drill.event("server lost, restored elsewhere from before", *machines.clients) as round_:
        drill.wait_for_others(round_)
        server = machines.process("server")
        for process in [*server.children(recursive=True), server]:
            kill(process)
        machines.started.pop("server").wait()
        shutil.rmtree(machines.server)
        machines.server_name = "moved"
        _federation("restore", file, machines.server)
        machines.start("server")
        drill.go()
        for name in machines.clients:
            machines.wait_for(lambda name=name: AHEAD in machines.said(name), f"{name}, ahead")
            machines.started[name].send_signal(signal.SIGTERM)
        machines.wait_for_end(machines.clients)
        machines.started["server"].send_signal(signal.SIGTERM)
        machines.wait_for_end(["server"])
        machines.start("server")
        for name in machines.clients:
            machines.start(name, "--go-back")


def _config(drill: Drill) -> Path:
    server: Path = drill.machines.server
    return server / "federation.toml"


def _federation(*words: str | Path) -> None:
    """A command of the operator."""
    command = [sys.executable, "-m", "fedalt", "federation", *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr, stderr=sys.stderr)
