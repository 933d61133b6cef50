"""The door says what it has refused, whoever knocks and however often, in a few lines."""

import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from machines import Machines, found

from fedalt.flower.config import read_server_config
from fedalt.flower.door import _MOST
from fedalt.flower.processes import free_port, wait_for_port
from fedalt.flower.status import shown


@pytest.fixture
def machines(tmp_path: Path, tiny_model_dir: Path) -> Machines:
    return found(tmp_path, tiny_model_dir, ("a", "b", "c"))


@contextmanager
def door(machines: Machines, inner: str) -> Iterator[ssl.SSLContext]:
    """The door of a server's folder, before a Flower that is not there; and how to trust it."""
    place = read_server_config(machines.server / "federation.toml").place
    place.logs.mkdir(parents=True)
    words = [machines.address, inner, "1000000"]
    words += [str(each) for each in (place.certificate, place.key, place.authority)]
    with (place.logs / "door.log").open("wb") as log:
        command = [sys.executable, "-m", "fedalt.flower.door", *words]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        assert wait_for_port(int(machines.address.split(":")[1]), process, 60)
        yield ssl.create_default_context(cafile=place.authority)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def say(machines: Machines, context: ssl.SSLContext, words: bytes) -> None:
    """Send bytes over an encrypted connection and break it off."""
    host, port = machines.address.split(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as one,
    ):
        one.sendall(words)
        one.settimeout(0.2)
        try:
            one.recv(1000)
        except TimeoutError:
            return


def test_what_the_door_refuses_is_counted_by_kind_and_shown(machines: Machines) -> None:
    config = read_server_config(machines.server / "federation.toml")
    with door(machines, str(free_port())) as context:
        with httpx.Client(base_url=f"https://{machines.address}", verify=context) as web:
            codes = [web.post("/v1/fleet/register-node?secret").status_code for _ in range(500)]
            codes += [web.request("PATCH", "/v1/fleet/get-run").status_code]
            codes += [web.get("/docs/secret").status_code, web.get("/").status_code]
            big = web.post("/v1/fleet/push-object", content=bytes(_MOST + 1)).status_code
            odd = [(b"flwr-public-key", b"\xe9secret"), (b"flwr-x", b"\xe9")]
            lost = web.post("/v1/fleet/get-run", headers=odd).status_code
        for _ in range(3):
            say(machines, context, b"secret\r\n\r\n")
            say(
                machines, context, b"POST /v1/fleet/get-run HTTP/1.1\r\nContent-Length: 9\r\n\r\nse"
            )
    assert (set(codes[:502]), codes[502], big, lost) == ({403}, 200, 413, 503)
    log = (config.place.logs / "door.log").read_text()
    told = {each["what"]: each for each in map(json.loads, log.splitlines())}
    assert {what: each["refused"] for what, each in told.items()} == {
        "403 this is not for clients": 502,
        f"413 a request has at most {_MOST} bytes": 1,
        "400 the request broke off": 3,
        "Invalid HTTP request received.": 3,
    }
    assert told["400 the request broke off"]["last_from"] == "127.0.0.1"
    assert "secret" not in log
    assert "  refused requests: 509 since " in shown(config)
    assert "    502: 403 this is not for clients" in shown(config)
