"""What is wrong about a federation's files is one clear line; what fails for ever has an end."""

import errno
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta, tzinfo
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import httpx
import psutil
import pytest
from commands import call
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from flwr.app import Message, MessageType
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from machines import Machines, found
from runs_for_tests import save_model, write_clients
from tiny import llama

from fedalt.core.codec import CodecError, decode
from fedalt.core.reading import PassingError
from fedalt.federation.messages import Answer
from fedalt.federation.transport import Lost
from fedalt.flower import credentials, grid_transport
from fedalt.flower.client_process import _REMIND, _Reports
from fedalt.flower.config import read_server_config
from fedalt.flower.connections import listeners
from fedalt.flower.credentials import make_authority, make_server
from fedalt.flower.fleet_client import server_trouble
from fedalt.flower.grid_transport import GridTransport
from fedalt.flower.message_content import content_of
from fedalt.flower.processes import (
    end_leftovers,
    is_running,
    process_group,
    shorten,
    write_pid,
)
from fedalt.flower.supervisor import _MOST_DEATHS, Patience, progress_of
from fedalt.runs.folder import StoreError, locked


@pytest.fixture
def machines(tmp_path: Path, tiny_model_dir: Path) -> Machines:
    return found(tmp_path, tiny_model_dir, ("a", "b", "c"))


def no_key(there: Machines) -> None:
    (there.server / "server.key").unlink()


def another_key(there: Machines) -> None:
    other = there.root / "other"
    other.mkdir()
    make_server(other, there.root / "authority", ["127.0.0.1"])
    (other / "server.key").rename(there.server / "server.key")


def ended(there: Machines) -> None:
    make_server(there.server, there.root / "authority", ["127.0.0.1"], days=-1)


def not_yet_valid(there: Machines) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credentials, "datetime", InAWeek)
        make_server(there.server, there.root / "authority", ["127.0.0.1"])


class InAWeek(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "InAWeek":
        return super().now(tz) + timedelta(days=7)


def of_another_authority(there: Machines) -> None:
    (other := there.root / "others").mkdir()
    make_authority(other, "others")
    make_server(there.server, other, ["127.0.0.1"])


def of_other_names(there: Machines) -> None:
    make_server(there.server, there.root / "authority", ["10.0.0.5", "example.org"])


def with_a_pass_phrase(there: Machines) -> None:
    file = there.server / "server.key"
    key: Any = load_pem_private_key(file.read_bytes(), None)
    secret = BestAvailableEncryption(b"secret")
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))


def no_public_key(there: Machines) -> None:
    (there.server / "clients" / "b.pub").unlink()


def no_real_public_key(there: Machines) -> None:
    (there.server / "clients" / "b.pub").write_text("ssh-rsa nothing")


def broken(there: Machines) -> None:
    (there.server / "federation.toml").write_text("[server\n")


def unknown(there: Machines) -> None:
    (there.server / "federation.toml").write_text("[rules]\ndeadlines = 3\n")


def no_port(there: Machines) -> None:
    (there.server / "federation.toml").write_text('[server]\naddress = "127.0.0.1"\n')


def no_terms(there: Machines) -> None:
    (there.server / "terms.toml").unlink()


def pipe_of(name: str) -> Callable[[Machines], None]:
    """Whoever reads it would wait for ever."""

    def mistake(there: Machines) -> None:
        (there.server / name).unlink()
        os.mkfifo(there.server / name)

    return mistake


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (no_key, "server.key: No such file or directory"),
        (another_key, "server.key: it is not the key of "),
        (with_a_pass_phrase, "expected one in PEM without a pass phrase"),
        (ended, "server.crt: the certificate expired on "),
        (not_yet_valid, "server.crt: the certificate is valid only from "),
        (of_another_authority, "server.crt: it was not signed by the authority of "),
        (of_other_names, "server.crt: it does not name 127.0.0.1, where the server's own"),
        (no_public_key, "b.pub: the public key of client 'b' is missing"),
        (no_real_public_key, "b.pub: it is no public key"),
        (broken, "federation.toml: not valid TOML"),
        (unknown, "unknown key 'deadlines'"),
        (no_port, "[server]: address = '127.0.0.1': expected host:port, such as"),
        (no_terms, "terms.toml is missing"),
        (pipe_of("terms.toml"), "terms.toml cannot be read: it is a pipe"),
        (pipe_of("federation.toml"), "federation.toml: cannot be read: it is a pipe"),
    ],
)
def test_a_mistake_in_the_servers_files_is_one_line(
    machines: Machines,
    capsys: pytest.CaptureFixture[str],
    mistake: Callable[[Machines], None],
    says: str,
) -> None:
    mistake(machines)
    capsys.readouterr()
    assert call("server", "--config", machines.server / "federation.toml") == 2
    assert_one_line(capsys, says)


def test_a_port_in_use_is_one_line(machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with socket.create_server(("127.0.0.1", int(machines.address.split(":")[1]))):
        assert call("server", "--config", machines.server / "federation.toml") == 2
    assert_one_line(capsys, f"address '{machines.address}': [Errno 98] Address already in use")


@pytest.mark.parametrize(
    ("settings", "words", "says"),
    [
        ("[training]\nprocesses = 2\n", ("--clients", "a,b"), "processes = 2 in [training]"),
        ("", ("--clients", "a,a"), "expected different names"),
        ("", ("--clients", "a,../b"), "client '../b': expected a name of at most 100 letters"),
        ("", ("--clients", "a,b", "--address", "here"), "expected host:port"),
        ("", ("--clients", "a,b", "--address", "::1:8443"), "or [fd00::5]:8443"),
        ("", ("--clients", "a,b", "--address", "0.0.0.0:8443"), "no client can call it"),
        ("", ("--clients", "a,b", "--address", "[::]:8443"), "no client can call it"),
    ],
)
def test_what_no_federation_can_be_made_of_is_one_line_and_leaves_no_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    words: tuple[str, ...],
    says: str,
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(settings)
    folder = tmp_path / "federation"
    assert call("federation", "init", folder, "--settings", file, *words) == 2
    assert_one_line(capsys, says)
    assert not folder.exists()


def test_a_second_server_or_client_on_a_folder_is_refused(
    machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for home, words in (
        (machines.server / "state" / "flower", ("server", machines.server / "federation.toml")),
        (machines.client("a") / "state", ("client", machines.client("a") / "client.toml")),
    ):
        with locked(home):
            assert call(words[0], "--config", words[1]) == 2
        assert_one_line(capsys, f"another process is using {home}")


def client_without_key(place: Path) -> None:
    (place / "client.key").unlink()


def client_without_authority(place: Path) -> None:
    (place / "ca.crt").unlink()


def client_without_data(place: Path) -> None:
    for each in (place / "data").iterdir():
        each.unlink()


def client_with_anothers_data(place: Path) -> None:
    client_without_data(place)
    write_clients(place / "data", ["b"])


def client_of_another_name(place: Path) -> None:
    (place / "client.toml").write_text('[client]\nname = "z"\nserver = "127.0.0.1:1"\n')


def client_of_no_server(place: Path) -> None:
    (place / "client.toml").write_text('[client]\nname = "a"\n')


def client_of_a_page(place: Path) -> None:
    (place / "client.toml").write_text('[client]\nname = "a"\nserver = "https://here:1"\n')


def client_with_another_model(place: Path) -> None:
    other = save_model(place / "model")
    model = llama()
    next(model.parameters()).data.add_(1.0)
    model.save_pretrained(other)
    about = f'[client]\nname = "a"\nserver = "127.0.0.1:1"\nmodel = "{other}"\n'
    (place / "client.toml").write_text(about)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (client_without_key, "client.key: No such file or directory"),
        (client_without_authority, "ca.crt: No such file or directory"),
        (client_without_data, "data"),
        (client_with_anothers_data, "holds the clients b, but this is the place of 'a' alone"),
        (client_of_another_name, "client 'z' is not in terms.toml of 'drill'"),
        (client_of_no_server, "[client] server is missing"),
        (client_of_a_page, "[client]: server = 'https://here:1': expected host:port, such as"),
        (client_with_another_model, "it is another model"),
    ],
)
def test_a_mistake_in_a_clients_files_is_one_line(
    machines: Machines,
    capsys: pytest.CaptureFixture[str],
    mistake: Callable[[Path], None],
    says: str,
) -> None:
    mistake(machines.client("a"))
    capsys.readouterr()
    assert call("client", "--config", machines.client("a") / "client.toml") == 2
    assert_one_line(capsys, says)


def assert_one_line(capsys: pytest.CaptureFixture[str], says: str) -> None:
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1
    assert says in told[0]


def test_what_dies_again_and_again_without_getting_further_has_an_end(machines: Machines) -> None:
    config = read_server_config(machines.server / "federation.toml")
    patience = Patience(config, progress_of(config), 0.0)
    for number in range(2 * _MOST_DEATHS):
        answers = machines.run / "incoming" / ("0000" if number < _MOST_DEATHS else "0000/share")
        answers.mkdir(parents=True, exist_ok=True)
        (answers / f"{number}.bin").touch()  # it gets further
        patience.died("the app has ended")
    for _ in range(_MOST_DEATHS - 2):
        patience.died("the app has ended")
    with pytest.raises(PassingError, match=f"{_MOST_DEATHS} deaths in a row"):
        patience.died("the app has ended")


def test_a_clock_that_is_wrong_is_told_before_a_key_is_refused() -> None:
    for minutes, says in ((-10, "ahead of"), (10, "behind"), (0, None)):

        class Other(BaseHTTPRequestHandler):
            shift = minutes

            def do_GET(self) -> None:
                self.send_response(403)
                self.end_headers()

            def date_time_string(self, timestamp: float | None = None) -> str:
                when = datetime.now(UTC) + timedelta(minutes=self.shift)
                return super().date_time_string(int(when.timestamp()))

            def log_message(self, *_: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Other) as server:
            Thread(target=server.handle_request, daemon=True).start()
            trouble = server_trouble(f"127.0.0.1:{server.server_port}", None)
        if says is None:
            assert trouble is None
        else:
            assert trouble is not None
            assert f"seconds {says} that of" in trouble


def test_trouble_that_lasts_comes_with_what_to_do_if_the_federation_has_ended() -> None:
    said: list[str] = []
    reports = _Reports(said.append)
    for _ in range(3):
        reports.trouble("it cannot be reached")
    text, when = reports.last["trouble"]
    reports.last["trouble"] = text, when - 2 * _REMIND
    reports.trouble("it cannot be reached")
    assert said == [
        "it cannot be reached",
        "it cannot be reached; if the federation has ended, Ctrl-C stops this, and nothing is lost",
    ]


def test_a_clock_that_is_set_anew_makes_no_process_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "app.pid"
    write_pid(file)
    assert is_running(file)
    # What psutil tells of all processes, and of the machine, moves with the clock.
    boot, born = psutil.boot_time(), psutil.Process.create_time
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: born(self) + 3600)
    assert is_running(file)
    pid, begun = file.read_text().split()
    file.write_text(f"{pid} {float(begun) - 1}")  # another one had this number
    assert not is_running(file)
    file.write_text(pid)
    with pytest.raises(StoreError, match="is damaged: expected the number of a process and when"):
        is_running(file)


def test_a_process_ends_with_its_group_and_a_killed_ones_are_ended_by_the_next(
    tmp_path: Path,
) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with process_group({}, tmp_path / "register.json") as processes:
        process = processes.start("sleep", sleep, tmp_path / "log")
        register = (tmp_path / "register.json").read_text()
    assert process.returncode is not None
    time.sleep(0.1)  # the system counts births in hundredths of a second
    left = subprocess.Popen(sleep)
    with process_group({}, tmp_path / "register.json") as processes:
        processes.start("sleep", sleep, tmp_path / "log")
        killed = (tmp_path / "register.json").read_text()
        (tmp_path / "copy.json").write_text(killed)
        end_leftovers(tmp_path / "copy.json")
        assert processes.dead() == "sleep"
    (tmp_path / "copy.json").write_text(register.replace(str(process.pid), str(left.pid)))
    end_leftovers(tmp_path / "copy.json")  # the number is another's by now
    assert left.poll() is None
    left.kill()
    left.wait()


def test_a_copy_of_a_folder_in_which_processes_run_is_refused_and_ends_none_of_them(
    tmp_path: Path,
) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    with process_group({}, one / "register.json") as processes:
        processes.start("sleep", sleep, tmp_path / "log")
        shutil.copytree(one, two)
        says = f"{two} is a copy of a folder in which process {os.getpid()} runs"
        with pytest.raises(StoreError, match=says), process_group({}, two / "register.json"):
            pass
        assert processes.dead() is None


def test_a_long_log_is_put_aside(tmp_path: Path) -> None:
    log = tmp_path / "some.log"
    log.write_bytes(bytes(11 * 2**20))
    shorten(log)
    assert not log.exists()
    log.write_text("short")
    shorten(log)
    assert log.read_text() == "short"


class Grid:
    """The part of Flower's grid that says who is there; it never has an answer."""

    connected = datetime.now(UTC)
    takes = True

    def get_nodes(self) -> list[NodeInfo]:
        when = self.connected.isoformat()
        return [NodeInfo(node_id=1, status="online", public_key=b"key", last_activated_at=when)]

    def push_messages(self, messages: list[object]) -> list[str | None]:
        return [f"message-{len(messages)}" if self.takes else None]

    def pull_messages(self, _: list[str]) -> list[object]:
        return []


class Replying(Grid):
    """A grid with a reply to each call, in the objects that Flower makes of it as it is pulled."""

    def __init__(self, *replies: dict[str, bytes] | Exception) -> None:
        self.replies: dict[str, dict[str, bytes] | Exception] = {}
        self.coming = list(replies)

    def get_nodes(self) -> list[NodeInfo]:
        when = self.connected.isoformat()
        return [
            NodeInfo(node_id=at, status="online", public_key=key, last_activated_at=when)
            for at, key in enumerate((b"key", b"another"), 1)
        ]

    def push_messages(self, messages: list[object]) -> list[str | None]:
        name = f"call-{len(self.replies)}"
        self.replies[name] = self.coming.pop(0)
        return [name]

    def pull_messages(self, names: list[str]) -> list[object]:
        pulled = []
        for name in names:
            if isinstance(reply := self.replies.pop(name, {}), Exception):
                raise reply
            if reply:
                root = list(reply)[-1]
                message: Any = inflate_object_from_contents(root, dict(reply))
                message.metadata.__dict__["_message_id"] = root
                pulled.append(message)
        return pulled


def objects_of(data: bytes, of: str) -> dict[str, bytes]:
    """A reply's objects, the root last."""
    call: Any = Message(content_of(b""), dst_node_id=1, message_type=MessageType.TRAIN)
    call.metadata.__dict__["_message_id"] = of
    nested = get_all_nested_objects(Message(content_of(data), reply_to=call))
    return {name: each.deflate() for name, each in nested.items()}


HEADS: list[Callable[[bytes], bytes]] = [
    lambda root: root.replace(b"Message", b"Massage", 1),
    lambda root: b"ConfigRecord" + root.removeprefix(b"Message"),
    lambda root: b"no head at all",
    lambda root: b"\xff" + root,
    lambda root: b"RecordDict  2\0{}",
]


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Grid:
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 2)
    monkeypatch.setattr(TaskIdentity, "_task_id", 3)
    return Grid()


def test_a_call_that_flower_does_not_take_is_lost(grid: Grid) -> None:
    grid.takes = False
    channel = GridTransport(grid, lambda: {"key": "a"}, 10)
    assert channel.online() == {"a"}
    channel.send([("a", b"call")])
    assert channel.receive() == [("a", Lost("it was away, and its call with it"))]
    assert channel.receive() == []


@pytest.mark.parametrize("head", HEADS)
def test_an_answer_that_flower_makes_nothing_of_is_one_clients_unreadable_answer(
    grid: Grid, head: Callable[[bytes], bytes]
) -> None:
    damaged = objects_of(b"answer", "call-0")
    root = list(damaged)[-1]
    damaged[root] = head(damaged[root])
    channel = GridTransport(
        Replying(damaged, objects_of(b"another answer", "call-1")),
        lambda: {"key": "a", "another": "b"},
        100,
    )
    assert channel.online() == {"a", "b"}
    channel.send([("a", b"call"), ("b", b"call")])
    came = dict([*channel.receive(), *channel.receive()])
    assert came.keys() == {"a", "b"}
    assert came["b"] == b"another answer"
    assert isinstance(came["a"], bytes)
    with pytest.raises(CodecError):
        decode(Answer, came["a"])
    assert channel.receive() == []


def test_an_answer_that_comes_in_part_holds_up_nobody_else(grid: Grid) -> None:
    whole = Event()

    class Slow(Replying):
        asked: ClassVar[list[str]] = []

        def pull_messages(self, names: list[str]) -> list[object]:
            self.asked.extend(names)
            if "call-0" in names:
                assert whole.wait(60)
            return super().pull_messages(names)

    replies = objects_of(b"long", "call-0"), objects_of(b"short", "call-1")
    channel = GridTransport(Slow(*replies), lambda: {"key": "a", "another": "b"}, 100)
    channel.online()
    channel.send([("a", b"call"), ("b", b"call")])
    assert channel.receive() == [("b", b"short")]
    assert channel.receive() == []
    assert Slow.asked.count("call-0") == 1
    whole.set()
    assert channel.receive() == [("a", b"long")]
    assert channel.receive() == []


class NeverEnding(Replying):
    """A grid on which the answers to all calls but one never come as a whole."""

    def __init__(self, ends: str) -> None:
        calls = [f"call-{number}" for number in range(1 + int(ends.removeprefix("call-")))]
        super().__init__(*(objects_of(b"answer", call) for call in calls))
        self.ends, self.over = ends, Event()

    def get_nodes(self) -> list[NodeInfo]:
        when = self.connected.isoformat()
        return [
            NodeInfo(node_id=at, status="online", public_key=b"%d" % at, last_activated_at=when)
            for at in range(10)
        ]

    def pull_messages(self, names: list[str]) -> list[object]:
        if names != [self.ends]:
            assert self.over.wait(60)
        return super().pull_messages(names)


@pytest.mark.parametrize("senders", [1, 9])
def test_uploads_that_never_end_hold_up_nobody_else_however_many(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, senders: int
) -> None:
    """Of one client, whose connection breaks off again and again, or of nine."""
    monkeypatch.setattr(grid_transport, "_IN_PART", 0.1)
    monkeypatch.setattr(grid_transport, "_PAUSE", 0.02)
    slow = NeverEnding("call-9")
    channel = GridTransport(slow, lambda: {str(at): str(at) for at in range(10)}, 100)
    channel.online()
    for number in range(9):
        client_id = str(number % senders)
        channel.send([(client_id, b"call")])
        assert channel.receive() == []
        if senders == 1:
            channel._give_up(client_id, datetime.now(UTC))
            assert [lost for _, lost in channel.receive()]
    time.sleep(0.2)
    channel.send([("9", b"call")])
    assert channel.receive() == [("9", b"answer")]
    slow.over.set()


def test_many_answers_come_and_each_clients_in_the_order_of_its_calls(grid: Grid) -> None:
    data = [f"answer {number}".encode() for number in range(40)]
    replies = [objects_of(each, f"call-{number}") for number, each in enumerate(data)]
    channel = GridTransport(Replying(*replies), lambda: {"key": "a", "another": "b"}, 100)
    channel.online()
    channel.send([("ab"[number % 2], b"call") for number in range(40)])
    came: dict[str, list[object]] = {"a": [], "b": []}
    for _ in range(40):
        for client_id, answer in channel.receive():
            came[client_id].append(answer)
    assert came == {"a": data[::2], "b": data[1::2]}


def test_an_answer_is_its_senders_whatever_call_it_says_it_is_to(grid: Grid) -> None:
    sly = Replying({}, objects_of(b"not a's", "call-0"))
    channel = GridTransport(sly, lambda: {"key": "a", "another": "b"}, 100)
    channel.online()
    channel.send([("a", b"call"), ("b", b"call")])
    assert channel.receive() == [("b", b"not a's")]


def test_a_broken_connection_to_flower_is_nobodys_answer(grid: Grid) -> None:
    channel = GridTransport(Replying(httpx.ReadError("broken")), lambda: {"key": "a"}, 100)
    channel.online()
    channel.send([("a", b"call")])
    with pytest.raises(httpx.ReadError):
        channel.receive()


def test_a_call_from_before_a_clients_connection_is_lost(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = GridTransport(grid, lambda: {"key": "a"}, 10)
    assert channel.online() == {"a"}
    channel.send([("a", b"call")])
    assert channel.receive() == []
    grid.connected = datetime.now(UTC) + timedelta(seconds=1)
    monkeypatch.setattr(channel, "_looked", 0.0)
    channel.online()
    assert channel.receive() == [("a", Lost("it was away, and its call with it"))]
    assert channel.receive() == []


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (ended, "certificate has expired"),
        (not_yet_valid, "the server needs a new certificate, unless this machine's clock is wrong"),
        (of_another_authority, "; ca.crt has to be the one of this server's federation"),
        (of_other_names, "; the server's certificate has to name the address in client.toml"),
    ],
)
def test_a_client_says_what_to_do_about_a_certificate_that_it_does_not_take(
    machines: Machines, mistake: Callable[[Machines], None], says: str
) -> None:
    mistake(machines)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(machines.server / "server.crt", machines.server / "server.key")

    def greet() -> None:
        with suppress(OSError), listener.accept()[0] as plain:
            context.wrap_socket(plain, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=greet, daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        told = server_trouble(address, str(machines.client("a") / "ca.crt"))
    assert told is not None
    assert told.startswith(f"{address} cannot be reached: ")
    assert says in told


def test_a_server_listens_at_the_addresses_of_a_name_that_its_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = socket.create_server
    none = OSError(errno.EADDRNOTAVAIL, "no IPv6")
    here: dict[int, OSError | None] = {socket.AF_INET: None, socket.AF_INET6: none}

    def create(place: tuple[str, int], *, family: int, backlog: int) -> socket.socket:
        if error := here[family]:
            raise error
        return real(place, family=family, backlog=backlog)

    two = [(family, 0, 0, "", (host, 0)) for family, host in ((10, "::1"), (2, "127.0.0.1"))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: two)
    monkeypatch.setattr(socket, "create_server", create)
    (one,) = listeners("localhost", 0)
    one.close()
    here[socket.AF_INET] = none
    with pytest.raises(OSError, match="no IPv6"):
        listeners("localhost", 0)
    here[socket.AF_INET] = OSError(errno.EADDRINUSE, "Address already in use")
    with pytest.raises(OSError, match="in use"):
        listeners("localhost", 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "state/log"), 75),
        (OSError(errno.EACCES, "Permission denied", "state/log"), 2),
        (PassingError("the gateway has ended; that was 6 deaths in a row"), 75),
    ],
)
def test_a_service_manager_learns_whether_starting_again_may_do(
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedalt.flower.supervisor.supervise", fail)
    monkeypatch.setattr("fedalt.flower.client_process.run_client", fail)
    capsys.readouterr()
    assert call("server", "--config", machines.server / "federation.toml") == code
    assert call("client", "--config", machines.client("a") / "client.toml") == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    wanted = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    assert told == [f"error: {wanted}"] * 2
