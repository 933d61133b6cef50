"""Folders of a federation as its server and clients leave them, made in this process."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runs_for_tests import settings_for, write_clients

from fedalt.core.codec import CodecError, decode
from fedalt.federation.client import Client
from fedalt.federation.messages import NEVER, Answer
from fedalt.federation.roster import read_roster
from fedalt.federation.transport import Lost
from fedalt.flower.config import client_from, read_client_config, read_server_config, server_from
from fedalt.flower.init import create_federation
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
    server_name: str = "server"

    @property
    def config(self) -> Path:
        """The operator's file."""
        return self.root / self.server_name / "federation.toml"

    @property
    def run(self) -> Path:
        """The server's own folder."""
        return self.root / self.server_name / "state" / "run"

    def client(self, name: str) -> Path:
        return self.root / "clients" / name

    def member(self, name: str, *, go_back: bool = False) -> Client:
        """A client as `fedalt client` opens it."""
        told = self.said.setdefault(name, [])
        config = read_client_config(self.client(name) / "client.toml")
        return client_from(replace(config, go_back=go_back), say=told.append)

    def go_on(
        self,
        spoil: Callable[[str, bytes], bytes | Lost] = lambda _, data: data,
        *,
        changes: Mapping[int, Callable[[], object]] | None = None,
        go_back: bool = False,
    ) -> None:
        """Server and clients, until the end or until `spoil` raises `Stopped`.

        A round's change is made as soon as its first answer has come; whoever was added has a
        folder and data from then on, and takes part.
        """
        config, waiting = read_server_config(self.config), dict(changes or {})

        def look(client_id: str, answer: bytes) -> bytes | Lost:
            if (change := waiting.pop(round_of(answer), None)) is not None:
                change()
                come()
            return spoil(client_id, answer)

        def come() -> None:
            removed = read_roster(config.roster).removed
            for name in set(config.clients) - wire.members.keys() - set(removed):
                write_clients(self.client(name) / "data", [name])
                wire.members[name] = self.member(name, go_back=go_back)

        wire = Wire({}, look)
        come()
        host = server_from(config, wire)
        with locked(self.run), contextlib.suppress(Stopped):
            host.to_the_end()


def round_of(answer: bytes) -> int:
    """The round of an answer to a call; that of a step of a secure sum is none of its own."""
    try:
        return decode(Answer, answer).round
    except CodecError:
        return NEVER


def founded(
    root: Path, model: Path, clients: Sequence[str] = CLIENTS, **sections: dict[str, Any]
) -> Federation:
    """A federation that has not begun."""
    settings = settings_for(model, write_clients(root / "all", clients), **sections)
    place = root / "federation"
    parts = prepare(settings).parts
    create_federation(place, clients, parts, name="letters", address="127.0.0.1:8443")
    for each in clients:
        write_clients(place / "clients" / each / "data", [each])
    return Federation(place)
