"""Strangers cost the door nothing that clients miss, and what it refused is told in a few lines."""

import argparse
import asyncio
import hashlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from access import signed
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from floods import KINDS, Flood, flooded, seconds_to_greet
from machines import Machines, found, wait_for

from fedalt.flower import connections
from fedalt.flower.client_keys import clients_by_key
from fedalt.flower.config import read_server_config
from fedalt.flower.gateway import LARGEST_REQUEST, serve
from fedalt.flower.places import ServerPlace
from fedalt.flower.processes import free_port, wait_for_port
from fedalt.flower.signatures import write_keys
from fedalt.flower.status import shown
from fedalt.runs.settings import SettingsError

MANY = [f"127.0.0.{number}" for number in range(2, 252)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Machines:
    return found(tmp_path_factory.mktemp("door"), tiny_model_dir, ("a", "b", "c"))


@dataclass
class Opened:
    """A door's process, and how to come to it."""

    place: ServerPlace
    address: str
    process: psutil.Process
    context: ssl.SSLContext
    key: Any  # client a's

    def web(self, kept: int | None = None) -> httpx.Client:
        """Whoever calls, with so many connections that are kept."""
        limits = httpx.Limits(max_keepalive_connections=kept)
        base = f"https://{self.address}"
        return httpx.Client(base_url=base, verify=self.context, timeout=60, limits=limits)

    def told(self) -> dict[str, dict[str, Any]]:
        """What the door has told by kind, once it has ended."""
        text = (self.place.logs / "gateway.log").read_text()
        assert "Traceback" not in text
        return {each["what"]: each for each in _json_lines(text)}


@contextmanager
def door(machines: Machines, inner: int, *more: str) -> Iterator[Opened]:
    """The door of a server's folder, before whatever is at a port of loopback."""
    config = read_server_config(machines.server / "federation.toml")
    place = config.place
    place.logs.mkdir(parents=True, exist_ok=True)
    place.flower.mkdir(parents=True, exist_ok=True)
    write_keys(place.let_in, clients_by_key(config))
    address = f"127.0.0.1:{free_port()}"
    words = [address, str(inner), "1000000"]
    words += [str(each) for each in (place.certificate, place.key, place.authority)]
    words += ["--keys", str(place.let_in), "--spool", str(place.flower), *more]
    key = load_ssh_private_key((machines.client("a") / "client.key").read_bytes(), None)
    with (place.logs / "gateway.log").open("wb") as log:
        command = [sys.executable, "-m", "fedalt.flower.gateway", *words]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        assert wait_for_port(int(address.split(":")[1]), process, 240)
        context = ssl.create_default_context(cafile=place.authority)
        yield Opened(place, address, psutil.Process(process.pid), context, key)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


class Inner(BaseHTTPRequestHandler):
    """Stands where Flower's server does: says what has come, and echoes what it is asked to."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        told = body if self.path.endswith("pull-object") else hashlib.sha256(body).digest()
        self.send_response(200)
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def inner(machines: Machines) -> Iterator[int]:
    place = read_server_config(machines.server / "federation.toml").place
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(place.certificate, place.key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Inner) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def opened(machines: Machines, inner: int) -> Iterator[Opened]:
    with door(machines, inner) as made:
        yield made


def say(there: Opened, words: bytes) -> bytes:
    """Send bytes over an encrypted connection; what is heard within a few seconds."""
    host, port = there.address.split(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        there.context.wrap_socket(plain, server_hostname=host) as one,
    ):
        one.sendall(words)
        one.settimeout(5)
        try:
            return one.recv(1000)
        except TimeoutError:
            return b""


def broken_off(there: Opened) -> None:
    """A client's request that does not come whole."""
    head = [f"{name}: {value}" for name, value in signed(there.key).items()]
    lines = ["POST /v1/fleet/get-run HTTP/1.1", "Host: server", "Content-Length: 9", *head]
    host, port = there.address.split(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        there.context.wrap_socket(plain, server_hostname=host) as one,
    ):
        one.sendall(("\r\n".join(lines) + "\r\n\r\nse").encode())
        time.sleep(0.5)


def test_what_the_door_refuses_is_counted_by_kind_and_shown(machines: Machines) -> None:
    config = read_server_config(machines.server / "federation.toml")
    with door(machines, free_port()) as there:
        with there.web() as web:
            codes = [web.post("/v1/fleet/register-node?secret").status_code for _ in range(100)]
            codes += [web.request("PATCH", "/v1/fleet/get-run").status_code]
            codes += [web.get("/docs/secret").status_code, web.get("/").status_code]
            big = web.post(
                "/v1/fleet/push-object",
                content=bytes(LARGEST_REQUEST + 1),
                headers=signed(there.key),
            ).status_code
            odd = [(b"flwr-public-key", b"\xe9secret"), (b"flwr-x", b"\xe9")]
            lost = web.post("/v1/fleet/get-run", headers=odd).status_code
            away = web.post("/v1/fleet/get-run", headers=signed(there.key)).status_code
        for _ in range(3):
            say(there, b"secret\r\n\r\n")
            broken_off(there)
    assert (set(codes[:102]), codes[102], big, lost, away) == ({403}, 200, 413, 401, 503)
    told = there.told()
    assert {what: each["refused"] for what, each in told.items()} == {
        "403 this is not for clients": 102,
        f"413 a request has at most {LARGEST_REQUEST} bytes": 1,
        "401 no signature of a client": 1,
        "400 the request broke off": 3,
        "Invalid HTTP request received.": 3,
    }
    assert told["400 the request broke off"]["last_from"] == "127.0.0.1"
    assert "secret" not in (config.place.logs / "gateway.log").read_text()
    assert "  refused requests: 110 since " in shown(config.place, config.terms)
    assert "    102: 403 this is not for clients" in shown(config.place, config.terms)


def test_a_request_without_a_clients_signature_is_refused_before_its_body_comes(
    opened: Opened,
) -> None:
    stranger, mine = generate_private_key(SECP384R1()), signed(opened.key)
    mixed = {**mine, "flwr-signature": signed(stranger)["flwr-signature"]}
    naive = signed(opened.key, datetime.now(UTC).replace(tzinfo=None))
    kinds: dict[str, dict[str, str]] = {
        "nothing": {},
        "only a key": {"flwr-public-key": mine["flwr-public-key"]},
        "no base64": {**mine, "flwr-public-key": "?"},
        "an empty signature": {**mine, "flwr-signature": ""},
        "no time": {**mine, "flwr-timestamp": "soon"},
        "a time without a zone": naive,
        "another time than was signed": {**mine, "flwr-timestamp": datetime.now(UTC).isoformat()},
        "yesterday": signed(opened.key, datetime.now(UTC) - timedelta(days=1)),
        "tomorrow": signed(opened.key, datetime.now(UTC) + timedelta(days=1)),
        "a stranger's key": signed(stranger),
        "a client's key, a stranger's signature": mixed,
        "no key at all": {**mine, "flwr-public-key": b64encode(b"no key").decode()},
    }
    for call in ("push-object", "push-messages"):
        for what, headers in kinds.items():
            lines = [
                f"POST /v1/fleet/{call} HTTP/1.1",
                "Host: server",
                f"Content-Length: {LARGEST_REQUEST}",
            ]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            heard = say(opened, ("\r\n".join(lines) + "\r\n\r\n").encode())
            assert heard.startswith(b"HTTP/1.1 401"), what
    with opened.web() as web:
        assert web.post("/v1/fleet/get-run", content=b"x", headers=mine).status_code == 200
        assert web.post("/v1/fleet/get-run", content=b"x", headers=mine).status_code == 409


def test_a_key_is_let_in_from_when_and_until_its_file_says_so(
    machines: Machines, inner: int
) -> None:
    config = read_server_config(machines.server / "federation.toml")
    with door(machines, inner) as there, there.web(0) as web:

        def code(call: str = "get-run") -> int:
            try:
                return web.post(
                    f"/v1/fleet/{call}", content=b"x", headers=signed(there.key)
                ).status_code
            except httpx.TransportError:  # the key ended while the request was under way
                return 0

        assert code() == 200
        try:
            write_keys(there.place.let_in, {})
            wait_for(lambda: code() == 401, "the key's end")
            assert code("activate-node") == 412  # which Flower's client tells from other refusals
        finally:  # the other tests' doors read the same file
            write_keys(there.place.let_in, clients_by_key(config))
        wait_for(lambda: code() == 200, "the key's return")


def test_what_clients_send_and_get_is_whole_and_takes_no_memory(opened: Opened) -> None:
    parts = [bytes([number]) * (30 * 2**20 + number) for number in range(6)]
    with opened.web() as web:
        web.post("/v1/fleet/push-object", content=parts[0], headers=signed(opened.key))
        before, most = opened.process.memory_info().rss, 0

        def send(part: bytes, call: str) -> bytes:
            return web.post(f"/v1/fleet/{call}", content=part, headers=signed(opened.key)).content

        with ThreadPoolExecutor(len(parts)) as threads:
            for call in ("push-object", "pull-object"):
                heard = [threads.submit(send, part, call) for part in parts]
                while not all(each.done() for each in heard):
                    most = max(most, opened.process.memory_info().rss)
                    time.sleep(0.01)
                for part, each in zip(parts, heard, strict=True):
                    wanted = part if call == "pull-object" else hashlib.sha256(part).digest()
                    assert each.result() == wanted
    assert (most - before) / 2**20 < 60  # of 180 MiB at a time


@pytest.mark.parametrize("sources", [["127.0.0.1"], MANY], ids=["one address", "many"])
def test_strangers_of_every_kind_cost_little_and_lock_nobody_out(
    machines: Machines, inner: int, sources: list[str]
) -> None:
    with door(machines, inner, "--keyless", "64", "--keyless-per-address", "32") as there:
        assert seconds_to_greet(there.address, there.place.authority) < 30
        with there.web() as web:
            web.post("/v1/fleet/get-run", content=b"x", headers=signed(there.key))
        before = there.process.memory_info().rss
        with flooded(there.address, there.place.authority, 12, sources), there.web() as web:
            growth = (there.process.memory_info().rss - before) / 2**20
            assert seconds_to_greet(there.address, there.place.authority) < 10
            answer = web.post("/v1/fleet/get-run", content=b"x", headers=signed(there.key))
            assert answer.status_code == 200
        assert growth < 60
    told = there.told()
    assert sum(each["refused"] for each in told.values()) >= 8 * len(KINDS)
    assert len(told) < 12


@pytest.mark.parametrize("sources", [["127.0.0.1"], MANY], ids=["one address", "many"])
def test_of_too_many_strangers_the_oldest_go_and_a_client_stays(
    machines: Machines, inner: int, sources: list[str]
) -> None:
    with (
        door(machines, inner, "--keyless", "40", "--keyless-per-address", "20") as there,
        there.web() as web,
    ):
        request: dict[str, Any] = {"url": "/v1/fleet/get-run", "content": b"x"}
        first = web.post(**request, headers=signed(there.key)).extensions["network_stream"]
        at = first.get_extra_info("client_addr")
        flood = Flood(there.address, there.place.authority, sources)
        try:
            for _ in range(4):
                flood.send("idle, no TLS begun", 50)
                assert seconds_to_greet(there.address, there.place.authority) < 10
                assert there.process.num_fds() < 100
                again = web.post(**request, headers=signed(there.key))
                assert again.status_code == 200
                assert again.extensions["network_stream"].get_extra_info("client_addr") == at
        finally:
            flood.close()
    whose = "from one address " if len(sources) == 1 else ""
    assert there.told()[f"connection dropped: too many {whose}without a key"]["refused"] >= 150


@contextmanager
def here(machines: Machines, inner: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """The door as a thread of this process, whose times can be changed."""
    config = read_server_config(machines.server / "federation.toml")
    place, address = config.place, f"127.0.0.1:{free_port()}"
    place.flower.mkdir(parents=True, exist_ok=True)
    write_keys(place.let_in, clients_by_key(config))
    words = argparse.Namespace(address=address, inner=str(inner), most=10**6)
    words.certificate, words.key, words.authority = place.certificate, place.key, place.authority
    words.keys, words.spool, words.keyless, words.keyless_per_address = (
        *(place.let_in, place.flower),
        *(64, 32),
    )
    servers: list[uvicorn.Server] = []
    make = uvicorn.Server

    def made(config: uvicorn.Config) -> uvicorn.Server:
        servers.append(make(config))
        return servers[0]

    monkeypatch.setattr(uvicorn, "Server", made)
    thread = threading.Thread(target=lambda: asyncio.run(serve(words)))
    thread.start()
    key = load_ssh_private_key((machines.client("a") / "client.key").read_bytes(), None)
    context = ssl.create_default_context(cafile=place.authority)
    opened = Opened(place, address, psutil.Process(), context, key)
    try:
        wait_for(lambda: _listens(address), "the door")
        yield opened
    finally:
        servers[0].should_exit = True
        thread.join()


def _listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0


@pytest.mark.long  # its door is a thread of this process, and it waits by the clock
def test_who_is_too_slow_is_dropped_but_not_who_goes_on_slowly(
    machines: Machines,
    inner: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, seconds in (("_HANDSHAKE", 1.0), ("_INTRODUCE", 2.0), ("_STALLED", 2.0)):
        monkeypatch.setattr(connections, name, seconds)

    def slowly() -> Iterator[bytes]:
        for _ in range(8):  # four times as long as a connection may be silent
            time.sleep(1.0)
            yield b"a"

    def stalled() -> Iterator[bytes]:
        yield b"a"
        time.sleep(8.0)
        yield b"a"

    with here(machines, inner, monkeypatch) as there, there.web() as web:
        flood = Flood(there.address, there.place.authority)
        for kind in ("idle, no TLS begun", "half a TLS greeting", "TLS and nothing else"):
            flood.send(kind, 2)
        flood.send("headers that do not end", 2)
        flood.send("half a small body", 2)
        flood.keep_alive(6.0)
        assert [each for each in flood.open if _is_open(each)] == []
        url = "/v1/fleet/push-object"
        assert web.post(url, content=slowly(), headers=signed(there.key)).content == (
            hashlib.sha256(b"a" * 8).digest()
        )
        with pytest.raises(httpx.TransportError):
            web.post(url, content=stalled(), headers=signed(there.key))
        flood.close()
    told = {each["what"]: each["refused"] for each in _json_lines(capsys.readouterr().out)}
    assert told["connection dropped: no TLS handshake within 1 seconds"] == 4
    assert told["connection dropped: no client's key within 2 seconds"] >= 4
    assert told["connection dropped: a client's, without a byte for 2 seconds"] == 1


def _is_open(one: socket.socket) -> bool:
    one.settimeout(1.0)
    try:
        while one.recv(1000):
            pass
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("in_all", "of_one"), [(0, 0), (10, 11), (10, 0), (-1, -1)])
def test_limits_that_would_let_nobody_in_are_refused(
    machines: Machines, in_all: int, of_one: int
) -> None:
    file = machines.server / "federation.toml"
    before = file.read_text()
    more = f"keyless = {in_all}\nkeyless_per_address = {of_one}\n"
    file.write_text(before.replace("[server]\n", f"[server]\n{more}"))
    try:
        with pytest.raises(SettingsError, match=r"\[server\].*keyless_per_address = "):
            read_server_config(file)
    finally:
        file.write_text(before)
