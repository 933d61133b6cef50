"""Whatever ends a client's connection, `fedalt client` tries again or says why it does not."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from commands import call
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from machines import Machines, found

from fedalt.flower import client_process, fleet_client
from fedalt.flower.config import read_client_config
from fedalt.flower.parent_pipe import receive
from fedalt.flower.signatures import _NOT_LET_IN
from fedalt.runs.settings import SettingsError


@pytest.fixture
def machines(tmp_path: Path, tiny_model_dir: Path) -> Machines:
    return found(tmp_path, tiny_model_dir, ("a", "b"))


class Server(BaseHTTPRequestHandler):
    """Lets a client in, drops the connection when it asks for a call, and knows its key no more."""

    protocol_version = "HTTP/1.1"
    removed = False

    def do_GET(self) -> None:
        self.answer(200, b"a federation's server")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        request = self.path.rpartition("/")[2]
        if request == "pull-messages" and not Server.removed:
            Server.removed = True  # while the request is under way
            self.connection.close()
            self.close_connection = True
        elif Server.removed:
            is_new = request == "activate-node"
            self.answer(412 if is_new else 401, _NOT_LET_IN.encode() if is_new else b"no key")
        elif request == "activate-node":
            self.answer(200, ActivateNodeResponse(node_id=7).SerializeToString())
        else:
            self.answer(200, SendNodeHeartbeatResponse(success=True).SerializeToString())

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Lossy(Server):
    """Drops the connection when it is asked for a call; a client that asks again has to go."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        request = self.path.rpartition("/")[2]
        Lossy.asked.append(request)
        if request == "activate-node":
            self.answer(200, ActivateNodeResponse(node_id=7).SerializeToString())
        elif request != "pull-messages":
            self.answer(200, SendNodeHeartbeatResponse(success=True).SerializeToString())
        elif Lossy.asked.count(request) > 1:
            self.answer(401, b"no key")
        else:
            self.connection.close()
            self.close_connection = True


@contextmanager
def serving(kind: type[Server] = Server) -> Iterator[str]:
    Server.removed = False
    Lossy.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def heard(config: client_process.ClientConfig, node: str) -> tuple[list[str], str]:
    """What one connection says until it ends, and why it ended."""
    kinds = []
    with client_process._connection(config, node) as (pipe, log):
        try:
            while True:
                kinds.append(receive(pipe)[0])
        except EOFError:
            return kinds, client_process._why(log)


def test_a_key_that_is_removed_during_a_request_is_told_at_the_next_try(machines: Machines) -> None:
    file = machines.client("a") / "client.toml"
    with serving() as address:
        file.write_text(f'[client]\nname = "a"\nserver = "{address}"\n')
        config = read_client_config(file, insecure=True)
        config.place.folder.mkdir()
        first, _ = heard(config, "")
        second, why = heard(config, "7")
    assert first in (["connected"], ["connected", "trouble"])
    assert second == []
    assert "its key is not known or was revoked" in why
    assert why.endswith("trying again")


def test_a_call_whose_way_failed_is_not_asked_for_again_over_the_same_connection(
    machines: Machines,
) -> None:
    # Flower hands a call out once. One that was on its way when the network failed comes again to
    # a new connection, and to none that goes on asking.
    file = machines.client("a") / "client.toml"
    with serving(Lossy) as address:
        file.write_text(f'[client]\nname = "a"\nserver = "{address}"\n')
        config = read_client_config(file, insecure=True)
        config.place.folder.mkdir()
        kinds, _ = heard(config, "")
        asked = list(Lossy.asked)
    assert kinds == ["connected"]
    assert asked.count("pull-messages") == 1
    assert "deactivate-node" in asked  # so that the next connection is let in at once


def failing(error: Exception, times: int) -> Callable[[], str]:
    """A request that fails so often and then has an answer."""
    left = [error] * times

    def ask() -> str:
        if left:
            raise left.pop()
        return "there"

    return ask


def status(code: int) -> httpx.HTTPStatusError:
    """An error that the server answers with."""
    request = httpx.Request("POST", "http://127.0.0.1/v1/fleet/push-object")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(code))


def test_all_else_is_asked_again_where_the_network_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_client, "_RETRY", (0.0,))
    assert fleet_client._patiently(failing(httpx.ReadError(""), 3)) == "there"
    assert fleet_client._patiently(failing(status(503), 3)) == "there"
    with pytest.raises(httpx.HTTPStatusError):
        fleet_client._patiently(failing(status(400), 1))
    with pytest.raises(httpx.ConnectError):
        fleet_client._patiently(failing(httpx.ConnectError(""), 100))


def half(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def rubbish(file: Path) -> None:
    file.write_bytes(bytes(range(256)))


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def another_kind(file: Path) -> None:
    key = generate_private_key(65537, 2048)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


EXPECTED = {"client.key": "expected ecdsa-sha2-nistp384", "ca.crt": "expected one in PEM"}
FILES = ("client.key", "ca.crt", "terms.toml", "client.toml")
CASES = [(name, damage) for name in FILES for damage in (half, emptied, rubbish, a_folder)]
CASES += [("client.key", another_kind), ("client.key", a_pipe), ("ca.crt", a_pipe)]


@pytest.mark.parametrize(
    ("name", "damage"), CASES, ids=lambda case: getattr(case, "__name__", case)
)
def test_a_damaged_file_of_a_client_ends_it_with_one_sentence(
    machines: Machines,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    file = machines.client("a") / name
    damage(file)
    capsys.readouterr()
    assert call("client", "--config", machines.client("a") / "client.toml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}")
    if damage not in (a_pipe, a_folder):
        assert EXPECTED.get(name, "") in line


def test_a_key_that_is_damaged_later_ends_the_client_too(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_client_config(machines.client("a") / "client.toml")
    monkeypatch.setattr(client_process, "client_from", lambda *_: None)
    monkeypatch.setattr(client_process, "_RETRY", (0.0,))
    tries: list[str] = []

    @contextmanager
    def connection(_: object, node: str) -> Iterator[tuple[None, Path]]:
        tries.append(node)
        half(config.place.key)
        log = config.place.folder / "link.log"
        log.write_text("OSError: the network is down\n")
        yield None, log

    monkeypatch.setattr(client_process, "_connection", connection)
    monkeypatch.setattr(client_process, "_answer_calls", lambda *_: ("", False))
    with pytest.raises(SettingsError, match=r"client\.key: it is no private key"):
        client_process.run_client(config, lambda _: None)
    assert tries == [""]
