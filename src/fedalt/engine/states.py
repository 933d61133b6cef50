"""Where a round finds the states of server and clients, and where it leaves the new ones."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedalt.adapters.initializer import Initializer
from fedalt.methods.contract import AnyMethod

T = TypeVar("T")


class States(Protocol):
    """Where the states of one arm lie: read as of the round before, written for this one."""

    def begin(self) -> None:
        """Forget what an attempt at this round that was cut short has left."""

    def get(self, key: str, cls: type[T]) -> T | None:
        """The newest value under a key such as "server" or "clients/alice", if there is one."""

    def backed(self, key: str, value: T) -> T:
        """A method's first value, its ledgers exchanged for what these states keep them in."""

    def put(self, key: str, value: object) -> None:
        """Keep a value; until the round is committed, the old one stays too."""

    def drop(self, key: str) -> None:
        """Forget what this round has put under a key and below it; the old values stay."""

    def spooling(self) -> AbstractContextManager[Path]:
        """An empty folder for the round's uploads, which is gone again afterwards."""

    def quarantine(self, client_id: str, reason: str, data: bytes, limit: int) -> None:
        """Note a rejected upload; keep its bytes unless more than `limit` would be kept in all."""


def server_of(
    method: AnyMethod, init: Initializer, states: States, leaving: Sequence[str] = ()
) -> Any:
    """The server's newest state, or its first.

    The part of those who are `leaving` is taken out, where the method can tell it.
    """
    kept = states.get("server", method.server_state)
    server = states.backed("server", method.init_server(init)) if kept is None else kept
    for client_id in leaving:
        rest = method.without(server, client_id)
        server = server if rest is None else rest
    return server


def client_of(method: AnyMethod, init: Initializer, states: States, client_id: str) -> Any:
    """A client's newest state, or its first."""
    kept = states.get(f"clients/{client_id}", method.client_state)
    return method.init_client(init, client_id) if kept is None else kept
