"""What `fedalt federation status` says of a server that runs, has died, or has ended."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from machines import Machines, Wire, found
from test_startup import modules_after

from fedalt.federation.client_folder import open_client
from fedalt.federation.transport import Lost
from fedalt.flower.config import ServerConfig, read_client_config, read_server_config, server_from
from fedalt.flower.processes import write_pid
from fedalt.flower.status import shown
from fedalt.runs.folder import StoreError

CLIENTS = ("a", "b", "c")


@pytest.fixture
def machines(tmp_path: Path, tiny_model_dir: Path) -> Machines:
    return found(tmp_path, tiny_model_dir, CLIENTS, rounds={"rounds": 3, "test": False})


@dataclass
class OneByOne(Wire):
    """Carries one answer at a time, and looks at the status before each."""

    config: ServerConfig | None = None
    looks: list[str] = field(default_factory=list)
    stop_after: int = 10**6

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        if len(self.looks) == self.stop_after:
            raise KeyboardInterrupt
        assert self.config is not None
        self.looks.append(shown(self.config.place, self.config.terms))
        calls, self.waiting = self.waiting[:1], self.waiting[1:]
        return [(client_id, self._answer(client_id, data)) for client_id, data in calls]


def wire(machines: Machines, **more: int) -> OneByOne:
    members = {}
    for each in CLIENTS:
        config = read_client_config(machines.client(each) / "client.toml")
        folder = config.place.folder
        members[each] = open_client(config.terms, each, config.place.data, folder, device="cpu")
    config = read_server_config(machines.server / "federation.toml")
    config.place.folder.mkdir(exist_ok=True)
    write_pid(config.place.pid)  # as the app does
    return OneByOne(members, config=config, **more)


def lines_of(text: str) -> dict[str, str]:
    """What is said of each client."""
    found = [line.strip().split(": ", 1) for line in text.splitlines()[1:]]
    return {name: about for name, about in found if name in CLIENTS}


def test_who_was_heard_is_known_in_every_round_and_after_a_restart(machines: Machines) -> None:
    first = wire(machines, stop_after=7)
    assert first.config is not None
    with pytest.raises(KeyboardInterrupt):
        server_from(first.config, first).to_the_end()
    assert any("last answer never" in each for each in first.looks)
    for look in first.looks[4:]:
        assert "never" not in look
        assert all(line.startswith("online") for line in lines_of(look).values())
    second = wire(machines)
    server_from(first.config, second).to_the_end()
    assert [look for look in second.looks if "never" in look] == []


def test_after_the_end_nobody_is_online_and_everybody_was_heard(machines: Machines) -> None:
    carrier = wire(machines)
    assert carrier.config is not None
    server_from(carrier.config, carrier).to_the_end()
    carrier.config.place.ended.touch()
    text = shown(carrier.config.place, carrier.config.terms)
    assert "3 of 3 rounds done; the server has ended" in text
    about = lines_of(text)
    assert sorted(about) == list(CLIENTS)
    for line in about.values():
        assert line.startswith("absent; last answer 20")


def test_of_a_server_that_does_not_run_nobody_is_online(machines: Machines) -> None:
    carrier = wire(machines, stop_after=5)
    config = carrier.config
    assert config is not None
    with pytest.raises(KeyboardInterrupt):
        server_from(config, carrier).to_the_end()
    assert "the server seen 0 seconds ago" in shown(config.place, config.terms)
    begun = config.place.pid.read_text().split()[1]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    config.place.pid.write_text(f"{dead.pid} {begun}")
    assert "the server does not run; it was seen " in shown(config.place, config.terms)
    assert {
        each.split(",")[0].split(";")[0]
        for each in lines_of(shown(config.place, config.terms)).values()
    } == {"absent"}
    # The number was another's before the power went.
    config.place.pid.write_text(f"{os.getpid()} {float(begun) - 60}")
    assert "the server does not run" in shown(config.place, config.terms)


def test_a_status_that_cannot_be_read_is_one_line_and_stops_no_server(machines: Machines) -> None:
    first = wire(machines, stop_after=5)
    assert first.config is not None
    with pytest.raises(KeyboardInterrupt):
        server_from(first.config, first).to_the_end()
    (machines.run / "status.json").write_text('{"heard": ')
    with pytest.raises(StoreError, match=r"status\.json is damaged: it is not JSON"):
        shown(first.config.place, first.config.terms)
    again = wire(machines, stop_after=0)
    again.stop_after = 10**6
    again.receive = super(OneByOne, again).receive  # type: ignore[method-assign]
    server_from(first.config, again).to_the_end()
    assert json.loads((machines.run / "status.json").read_text())["heard"].keys() == set(CLIENTS)


def test_what_is_no_refusal_in_the_doors_log_is_passed_over(machines: Machines) -> None:
    config = read_server_config(machines.server / "federation.toml")
    config.place.logs.mkdir(parents=True)
    line = {"time": "2026-01-01 10:00:00", "refused": 7, "what": "401 x", "last_from": "10.0.0.9"}
    noise = '{no json}\n{"time": 3}\n[]\n7\n{"refused": \nTraceback\n\x1b[0m{}\n'
    (config.place.logs / "gateway.log").write_text(f"{noise}{json.dumps(line)}\n{noise}")
    text = shown(config.place, config.terms)
    assert "refused requests: 7 since 2026-01-01 10:00:00, the last from 10.0.0.9" in text


def test_the_command_imports_no_heavy_library(machines: Machines) -> None:
    config = machines.server / "federation.toml"
    assert modules_after("federation", "status", "--config", config) == ["code 0", "heavy []"]
