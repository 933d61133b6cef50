"""Folders of a federation as its server and clients leave them, made in this process."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs_for_tests import settings_for, write_clients

from fedalt.core.codec import decode
from fedalt.federation.client import Client
from fedalt.federation.messages import Answer
from fedalt.federation.transport import Lost
from fedalt.flower.config import read_client_config, read_server_config
from fedalt.flower.init import create_federation
from fedalt.flower.participants import client_from, server_from
from fedalt.runs.folder import locked
from fedalt.runs.setup import prepare

CLIENTS = ("a", "b", "c")


class Stopped(Exception):  # noqa: N818 - no mistake
    """The server is killed here."""


@dataclass
class Wire:
    """Carries bytes between a host and members in this process; `spoil` may change an answer."""

    members: dict[str, Client]
    spoil: Callable[[str, bytes], bytes | Lost] = lambda _, data: data
    waiting: list[tuple[str, bytes]] = field(default_factory=list)

    def online(self) -> frozenset[str]:
        return frozenset(self.members)

    def send(self, calls: Iterable[tuple[str, bytes]]) -> None:
        self.waiting += calls

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        calls, self.waiting = self.waiting, []
        return [(each, self.spoil(each, self.members[each].answer(data))) for each, data in calls]


@dataclass
class Federation:
    """Its folders, as `fedalt federation init` makes them, with each client's data."""

    root: Path
    said: dict[str, list[str]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The server's own folder."""
        return self.root / "server" / "state" / "run"

    def client(self, name: str) -> Path:
        return self.root / "clients" / name

    def member(self, name: str) -> Client:
        """A client as `fedalt client` opens it."""
        told = self.said.setdefault(name, [])
        return client_from(read_client_config(self.client(name) / "client.toml"), say=told.append)

    def go_on(self, spoil: Callable[[str, bytes], bytes | Lost] = lambda _, data: data) -> None:
        """Server and clients, until the end or until `spoil` raises `Stopped`."""
        config = read_server_config(self.root / "server" / "federation.toml")
        wire = Wire({each: self.member(each) for each in config.clients}, spoil)
        host = server_from(config, wire)
        with locked(self.run), contextlib.suppress(Stopped):
            host.to_the_end()

    def grow(self, changes: dict[int, Callable[[], object]]) -> None:
        """To the end; a round's change is made as soon as its first answer has come.

        Whoever is added has a folder, with data, and takes part.
        """
        config = read_server_config(self.root / "server" / "federation.toml")
        waiting = dict(changes)

        def look(_: str, answer: bytes) -> bytes:
            if (act := waiting.pop(decode(Answer, answer).round, None)) is not None:
                act()
                for name in config.clients:
                    if name not in wire.members:
                        write_clients(self.client(name) / "data", [name])
                        wire.members[name] = self.member(name)
            return answer

        wire = Wire({each: self.member(each) for each in config.clients}, look)
        with locked(self.run):
            server_from(config, wire).to_the_end()


def founded(root: Path, model: Path, **sections: dict[str, Any]) -> Federation:
    """A federation that has not begun."""
    settings = settings_for(model, write_clients(root / "all", CLIENTS), **sections)
    place = root / "federation"
    parts = prepare(settings).parts
    create_federation(place, CLIENTS, parts, name="letters", address="127.0.0.1:8443")
    for each in CLIENTS:
        write_clients(place / "clients" / each / "data", [each])
    return Federation(place)
