"""Whatever appears in the clients' folder of a running server, it goes on and tells that once."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from machines import Machines, found

from fedalt.flower import admission
from fedalt.flower.admission import Admission
from fedalt.flower.client_keys import ClientKeys, clients_by_key
from fedalt.flower.config import read_server_config
from fedalt.flower.credentials import make_client_key, pem_of
from fedalt.flower.places import ServerPlace
from fedalt.flower.revocation import revoke_key
from fedalt.runs.settings import SettingsError


@dataclass
class Flower:
    """In the place of Flower's list of keys, which a running server alone has."""

    registered: set[str] = field(default_factory=set)
    shut_out: set[str] = field(default_factory=set)

    def register(
        self, port: int, place: ServerPlace, clients: dict[str, str], others: set[str], say: Any
    ) -> None:
        self.shut_out |= self.registered - clients.keys() - others
        self.registered = self.registered & (clients.keys() | others) | clients.keys()


@dataclass
class Running:
    """The part of a running server that looks at its clients' folder."""

    machines: Machines
    flower: Flower
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = read_server_config(self.machines.server / "federation.toml")
        self.config.place.flower.mkdir(parents=True, exist_ok=True)
        self.admission = Admission(ClientKeys(self.config))
        self.app = ClientKeys(self.config)  # the app is another process

    def look(self) -> list[str]:
        """What is said when it looks twice: the second time nothing is new."""
        before = len(self.said)
        for _ in range(2):
            self.admission.update(1, self.said.append)
        assert len(set(self.said[before:])) == len(self.said[before:])
        return self.said[before:]

    def let_in(self) -> list[str]:
        """Which clients are let in: by the door, and in the app's eyes."""
        door = set(json.loads(self.config.place.let_in.read_text()))
        names = dict(self.app.now())
        assert names.keys() == door <= self.flower.registered
        return sorted(names.values())

    def file(self, name: str) -> Path:
        return self.config.place.clients / name


@pytest.fixture
def running(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    flower = Flower()
    monkeypatch.setattr(admission, "register_keys", flower.register)
    made = Running(found(tmp_path, tiny_model_dir, ("a", "b", "c")), flower)
    assert made.look() == []
    assert made.let_in() == ["a", "b", "c"]
    yield made
    assert flower.shut_out == set() or "revoked" in str(list(made.file(".").iterdir()))


def half(running: Running) -> None:
    whole = running.file("b.pub").read_bytes()
    running.file("b.pub").write_bytes(whole[: len(whole) // 2])


def empty(running: Running) -> None:
    running.file("b.pub").write_bytes(b"")


def not_a_key(running: Running) -> None:
    running.file("b.pub").write_bytes(bytes(range(256)))


def private(running: Running) -> None:
    shutil.copy(running.machines.client("b") / "client.key", running.file("b.pub"))


def another_kind(running: Running) -> None:
    key = generate_private_key(65537, 2048).public_key()
    running.file("b.pub").write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def folder(running: Running) -> None:
    running.file("b.pub").unlink()
    running.file("b.pub").mkdir()


def pipe(running: Running) -> None:
    running.file("b.pub").unlink()
    os.mkfifo(running.file("b.pub"))


def twice(running: Running) -> None:
    shutil.copy(running.file("a.pub"), running.file("b.pub"))


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (half, "b.pub: it is no public key"),
        (empty, "b.pub: it is no public key"),
        (not_a_key, "b.pub: it is no public key"),
        (private, "b.pub: it is no public key"),
        (another_kind, "expected ecdsa-sha2-nistp384"),
        (folder, "b.pub: cannot be read: it is no file"),
        (pipe, "b.pub: cannot be read: it is no file"),
        (twice, "b.pub: client 'b' has the same key as client 'a'; each needs its own"),
    ],
)
def test_what_is_no_whole_key_of_its_own_is_told_once_and_the_one_before_goes_on(
    running: Running, mistake: Callable[[Running], None], says: str
) -> None:
    whole = running.file("b.pub").read_bytes()
    mistake(running)
    (said,) = running.look()
    assert says in said
    assert running.let_in() == ["a", "b", "c"]
    with pytest.raises(SettingsError) as error:  # a server that starts has nothing to go on with
        clients_by_key(running.config)
    assert says in str(error.value)
    shutil.rmtree(running.file("b.pub")) if mistake is folder else running.file("b.pub").unlink()
    running.file("b.pub").write_bytes(whole)
    assert running.look() == ["every client's key is in order again"]
    assert running.let_in() == ["a", "b", "c"]


def test_a_new_key_that_is_copied_piece_by_piece_is_let_in_once_it_is_whole(
    running: Running, tmp_path: Path
) -> None:
    make_client_key(tmp_path / "new.key", tmp_path / "new.pub")
    new = (tmp_path / "new.pub").read_bytes()
    revoke_key(running.config.place, "b")
    running.look()
    assert running.let_in() == ["a", "c"]
    for length in range(0, len(new), 20):
        running.file("b.pub").write_bytes(new[:length])
        running.look()
        assert running.let_in() == ["a", "c"]
    running.file("b.pub").write_bytes(new)
    running.look()
    assert running.let_in() == ["a", "b", "c"]
    assert pem_of(tmp_path / "new.pub") in running.flower.registered
    assert len(running.flower.shut_out) == 1  # the one that was revoked


def test_a_file_that_is_gone_shuts_its_client_out_until_it_is_back(running: Running) -> None:
    whole = running.file("b.pub").read_bytes()
    running.file("b.pub").unlink()
    (said,) = running.look()
    assert "b.pub: the public key of client 'b' is missing" in said
    assert running.let_in() == ["a", "c"]
    running.file("b.pub").write_bytes(whole)
    running.look()
    assert running.let_in() == ["a", "b", "c"]


def test_other_files_are_no_keys(running: Running) -> None:
    for name in ("b.pub~", ".b.pub.swp", "#b.pub#", "README"):
        running.file(name).write_text("nothing")
    running.file("old").mkdir()
    running.file("gone.pub.lnk").symlink_to(running.file("nowhere"))
    assert running.look() == []
    shutil.copy(running.file("b.pub"), running.file("zoe.pub"))
    (said,) = running.look()
    assert "zoe.pub: no client is called 'zoe', so this key is not used" in said
    assert running.let_in() == ["a", "b", "c"]


@contextmanager
def moved(one: Path) -> Iterator[None]:
    other = one.with_name("elsewhere")
    one.rename(other)
    yield
    other.rename(one)


def test_a_folder_that_is_gone_takes_nobodys_key_away(running: Running) -> None:
    with moved(running.config.place.clients):
        (said,) = running.look()
        assert "clients: cannot be read: No such file or directory" in said
        assert running.let_in() == ["a", "b", "c"]
    assert running.look() == ["every client's key is in order again"]
