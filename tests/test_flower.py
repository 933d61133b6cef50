"""A federation of real processes: what is killed comes back, and the numbers are the same."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from access import activation, attempts, not_refused, signed
from commands import call
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from machines import Machines, assert_as_in_one_process, found, kill
from runs_for_tests import save_model, write_clients

from fedalt.core.settings import Stay
from fedalt.flower.config import read_server_config
from fedalt.flower.credentials import make_client_key
from fedalt.flower.processes import wait_for_port
from fedalt.flower.status import shown
from fedalt.runs.folder import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CLIENTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def machines(tmp_path: Path, model: Path) -> Iterator[Machines]:
    # Long enough that somebody can be killed while training.
    made = found(tmp_path, model, CLIENTS, rounds={"rounds": 6}, training={"local_epochs": 8})
    try:
        yield made
    finally:
        made.kill_all()


def test_whatever_is_killed_the_federation_ends_with_the_same_numbers(
    machines: Machines, tmp_path: Path
) -> None:
    everyone = ("server", *CLIENTS)
    for each in everyone:  # nothing listens there, and no proxy is for this machine itself
        machines.start(each, HTTPS_PROXY="http://127.0.0.1:9")

    machines.wait_for(lambda: "round 1:" in machines.said("server"), "round 1")
    kill(machines.fleet_client("a"))  # Flower keeps its client out for a minute
    machines.wait_for(lambda: machines.answered(0) == ["b", "c"], "the answers of b and c")
    kill(machines.app())
    machines.wait_for(lambda: "starting it again" in machines.said("server"), "the app's death")
    kill(machines.gateway())
    kill(machines.superlink())
    machines.wait_for_round(1)

    told = machines.client("b") / "state" / "accepted.json"
    machines.wait_for(lambda: json.loads(told.read_text())["accepted"] == 0, "the call of round 1")
    kill(machines.process("b"))  # it trains
    machines.started["c"].send_signal(signal.SIGTERM)
    assert machines.wait_for_end(["c"]) == {"c": 130}
    machines.start("b")
    machines.start("c")
    machines.wait_for_round(2)

    machines.process("a").suspend()  # so that no round ends without a server
    starts = machines.said("server").count("listening")
    kill(machines.process("server"))
    machines.start("server")
    machines.wait_for(lambda: machines.said("server").count("listening") > starts, "the server")
    machines.process("a").resume()

    assert machines.wait_for_end(everyone) == dict.fromkeys(everyone, 0)
    assert machines.processes() == []
    assert not any("Traceback" in machines.said(each) for each in everyone)
    assert_as_in_one_process(machines, tmp_path / "undisturbed")
    for each in CLIENTS:
        assert re.search(r"\d\d:\d\d:\d\d  \w: round 6/6: trained \d+ steps", machines.said(each))
    assert call("report", machines.run, "--quiet") == 0
    assert call("generate", machines.client("a"), "ask 1a") == 0


@pytest.mark.long
def test_clients_are_added_removed_and_given_other_keys_while_all_goes_on(
    machines: Machines, tmp_path: Path
) -> None:
    config = machines.server / "federation.toml"
    for each in ("server", *CLIENTS):
        machines.start(each)
    machines.wait_for_round(1)
    joined = held(machines, ["b", "c"]) + 1
    assert call("federation", "add", config, "d") == 0
    write_clients(machines.client("d") / "data", ["d"])
    machines.start("d")
    assert call("federation", "rotate-key", config, "c") == 0
    machines.process("a").resume()
    machines.wait_for_round(joined + 1)  # with d, and with c's other key
    left = held(machines, ["b", "c", "d"]) + 1
    assert call("federation", "remove", config, "b") == 0
    machines.started.pop("b").terminate()
    machines.process("a").resume()
    staying = ("server", "a", "c", "d")
    assert machines.wait_for_end(staying) == dict.fromkeys(staying, 0)

    stays = open_run(machines.run).facts()["stays"]
    assert stays["d"] == {"joins": joined}
    assert stays["b"] == {"leaves": left}
    four = write_clients(tmp_path / "four", ("a", "b", "c", "d"))
    settings = replace(
        machines.settings,
        data=replace(machines.settings.data, path=four),
        clients={name: Stay(**stay) for name, stay in stays.items()},
    )
    whole = replace(machines, settings=settings, clients=("a", "c", "d"))
    # A call scores the round before it: of who comes and goes other rounds than a run does.
    assert_as_in_one_process(whole, tmp_path / "undisturbed", splits=["test"])


def held(machines: Machines, others: list[str]) -> int:
    """The round that does not end because a is stopped, once all others have answered."""
    machines.process("a").suspend()
    machines.wait_for(lambda: machines.answered(machines.rounds_done()) == others, "the others")
    return machines.rounds_done()


@pytest.mark.long
def test_nobody_else_is_let_in(machines: Machines) -> None:
    machines.start("server")
    machines.wait_for(lambda: "listening" in machines.said("server"), "the server")
    wait_for_port(int(machines.address.split(":")[1]), machines.started["server"], 60)
    assert not_refused(attempts(machines)) == []
    machines.wait_for(lambda: "b: revoked" in status(machines), "the status")
    machines.started["server"].send_signal(signal.SIGTERM)
    assert machines.wait_for_end(["server"]) == {"server": 130}
    assert machines.processes() == []


@pytest.mark.long
def test_without_encryption_keys_still_count_and_it_is_said_loudly(
    tmp_path: Path, model: Path
) -> None:
    machines = found(tmp_path, model, ["a"], rounds={"rounds": 1, "test": False})
    try:
        everyone = ("server", "a")
        for each in everyone:
            machines.start(each, "--insecure")
        machines.wait_for(lambda: "listening" in machines.said("server"), "the server")
        wait_for_port(int(machines.address.split(":")[1]), machines.started["server"], 60)
        make_client_key(tmp_path / "stranger", tmp_path / "stranger.pub")
        key = load_ssh_private_key((tmp_path / "stranger").read_bytes(), None)
        with httpx.Client(base_url=f"http://{machines.address}/v1/fleet/") as web:
            sent = {"content-type": PROTOBUF_MEDIA_TYPE}
            unknown = web.post(
                "activate-node", content=activation(key), headers={**sent, **signed(key)}
            )
            unsigned = web.post("activate-node", content=activation(key), headers=sent)
            myself = web.post("register-node", content=b"", headers={**sent, **signed(key)})
        assert (unknown.status_code, unsigned.status_code, myself.status_code) == (412, 401, 403)
        assert machines.wait_for_end(everyone) == dict.fromkeys(everyone, 0)
        assert "WITHOUT ENCRYPTION" in machines.said("server")
        for each in everyone:
            assert "whoever is on the network can read and change every" in machines.said(each)
    finally:
        machines.kill_all()


@pytest.mark.long
def test_who_was_away_at_the_end_is_told_when_the_server_is_started_again(
    tmp_path: Path, model: Path
) -> None:
    machines = found(tmp_path, model, CLIENTS, rounds={"rounds": 1, "test": False})
    file = machines.server / "federation.toml"
    file.write_text(file.read_text().replace("minimum = 1", "minimum = 2\ndeadline = 2"))
    try:
        there = ("server", "a", "b")
        for each in there:
            machines.start(each)
        assert machines.wait_for_end(there) == dict.fromkeys(there, 0)
        assert "not told that it has ended: c" in machines.said("server")
        machines.start("server")
        machines.start("c")
        assert machines.wait_for_end(["c"]) == {"c": 0}
        assert "c: the federation has ended" in machines.said("c")
        machines.started["server"].send_signal(signal.SIGTERM)
        assert machines.wait_for_end(["server"]) == {"server": 130}
        assert machines.processes() == []
    finally:
        machines.kill_all()


def status(machines: Machines) -> str:
    config = read_server_config(machines.server / "federation.toml")
    return shown(config.place, config.terms)
