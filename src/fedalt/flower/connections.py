"""Who is connected to a listener: how many, for how long, and who has to go first.

A connection is a stranger's until a request comes over it that is signed with a client's key. A new
one is always let in; where there are too many of strangers, the oldest one has to go, of the
address that holds most of them. So strangers push each other out, and never a client.
"""

import asyncio
import errno
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, TypeVar

from fedalt.flower.refusals import Refusals

_HANDSHAKE: Final = 10.0  # seconds from the connection to the end of TLS's handshake
_INTRODUCE: Final = 20.0  # and to a client's signature
_GOODBYE: Final = 3.0  # seconds for the end of TLS
_STALLED: Final = 60.0  # seconds without a byte of what a client sends or is sent
_PER_KEY: Final = 32  # connections of one client, which needs about four
_LOOK: Final = 1.0
_NETWORK: Final = 64  # bits of an IPv6 address that whoever has one shares with all of theirs


@dataclass(eq=False)
class Connection:
    """One that is open, or about to be."""

    address: str
    network: str  # what counts as one address
    begun: float
    moved: float = 0.0  # when a byte came or went
    key: bytes | None = None  # the client's that it is, once that is known
    is_ours: bool = False  # whether it is our turn: the client waits
    buffered: int = 0
    transport: asyncio.Transport | None = None
    task: "asyncio.Task[None] | None" = None

    def drop(self) -> None:
        """End it at once, whatever state it is in."""
        if self.transport is not None:
            self.transport.abort()
        elif self.task is not None:
            self.task.cancel()

    def note_movement(self, now: float) -> None:
        """Note whether the other side takes what it is sent."""
        buffered = 0 if self.transport is None else self.transport.get_write_buffer_size()
        if buffered != self.buffered:
            self.buffered, self.moved = buffered, now


Name = TypeVar("Name", str, bytes)
Groups = dict[Name, dict[Connection, None]]


@dataclass
class Connections:
    """All of a listener: at most `in_all` of strangers, and `per_address` of one address."""

    in_all: int
    per_address: int
    refusals: Refusals
    strangers: "Groups[str]" = field(default_factory=dict)  # by network, by age
    clients: "Groups[bytes]" = field(default_factory=dict)  # by key, by age

    def begin(self, connection: Connection) -> None:
        """Take one in, and drop others where that is one too many."""
        neighbours = self.strangers.setdefault(connection.network, {})
        neighbours[connection] = None
        if len(neighbours) > self.per_address:
            self._drop(next(iter(neighbours)), "too many from one address without a key")
        elif sum(map(len, self.strangers.values())) > self.in_all:
            self.drop_stranger("too many without a key")

    def drop_stranger(self, why: str) -> None:
        """Drop the oldest connection of the address that has most of them without a key."""
        if self.strangers:
            fullest = max(self.strangers.values(), key=len)
            self._drop(next(iter(fullest)), why)

    def introduce(self, connection: Connection, key: bytes) -> None:
        """It is this client's, as a signature says."""
        if connection.key == key or connection.transport is None:
            return
        if connection.transport.is_closing():  # it was dropped since
            return
        self.end(connection)
        connection.key = key
        same_key = self.clients.setdefault(key, {})
        same_key[connection] = None
        if len(same_key) > _PER_KEY:
            self._drop(next(iter(same_key)), "too many with one key")

    def end(self, connection: Connection) -> None:
        """It is no more."""
        if connection.key is None:
            _take_out(connection, self.strangers, connection.network)
        else:
            _take_out(connection, self.clients, connection.key)

    async def watch(self, keys: Callable[[], Container[bytes]]) -> None:
        """Drop what takes too long, and whose key is none of `keys()` any more, for ever."""
        while True:
            await asyncio.sleep(_LOOK)
            known, now = keys(), time.monotonic()
            for stranger in [*chain.from_iterable(self.strangers.values())]:
                if stranger.transport is not None and stranger.transport.is_closing():
                    stranger.drop()  # it was answered
                elif stranger.transport is None and now - stranger.begun > _HANDSHAKE:
                    self._drop(stranger, f"no TLS handshake within {_HANDSHAKE:.0f} seconds")
                elif now - stranger.begun > _INTRODUCE:
                    self._drop(stranger, f"no client's key within {_INTRODUCE:.0f} seconds")
            for client in [*chain.from_iterable(self.clients.values())]:
                client.note_movement(now)
                if client.key is None or client.key not in known:
                    self._drop(client, "its key is no client's any more")
                elif not client.is_ours and now - client.moved > _STALLED:
                    self._drop(client, f"a client's, without a byte for {_STALLED:.0f} seconds")

    def _drop(self, connection: Connection, why: str) -> None:
        self.refusals.count(f"connection dropped: {why}", connection.address)
        self.end(connection)
        connection.drop()

    async def accept(
        self,
        listener: socket.socket,
        context: ssl.SSLContext | None,
        serve: Callable[[Connection], asyncio.Protocol],
    ) -> None:
        """Take in whoever calls, for ever; `serve` makes what speaks HTTP over a connection."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                plain, peer = await loop.sock_accept(listener)
            except OSError as error:  # too many open files, or it has gone again already
                self.refusals.count(f"connection not accepted: {error.strerror}")
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self.drop_stranger("too many open files")
                    await asyncio.sleep(0.05)
                continue
            now = time.monotonic()
            connection = Connection(peer[0], _network(peer[0]), now, now)
            opening = self._open(connection, plain, context, serve)
            connection.task = loop.create_task(opening)
            self.begin(connection)

    async def _open(
        self,
        connection: Connection,
        plain: socket.socket,
        context: ssl.SSLContext | None,
        serve: Callable[[Connection], asyncio.Protocol],
    ) -> None:
        """Begin TLS, once the other side has begun: until then a connection costs nothing."""
        loop = asyncio.get_running_loop()
        has_begun = False
        try:
            has_begun = await _has_begun(loop, plain)
        finally:
            if not has_begun:  # it has gone again, or is dropped
                plain.close()
                self.end(connection)
        if not has_begun:
            return
        try:
            await loop.connect_accepted_socket(
                lambda: _Watched(connection, self, serve(connection)),
                plain,
                ssl=context,
                ssl_handshake_timeout=None if context is None else _HANDSHAKE,
                ssl_shutdown_timeout=None if context is None else _GOODBYE,
            )
        except OSError:
            self.refusals.count("TLS handshake failed", connection.address)
        finally:
            if connection.transport is None:
                self.end(connection)


class _Watched(asyncio.Protocol):
    """Passes on what happens to a connection, and notes it."""

    def __init__(self, connection: Connection, all_: Connections, inner: asyncio.Protocol) -> None:
        self.connection, self.all, self.inner = connection, all_, inner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connection.transport = transport  # type: ignore[assignment]
        self.inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self.connection.moved = time.monotonic()
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self.inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.end(self.connection)
        self.inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()


def _take_out(connection: Connection, groups: Groups[Name], name: Name) -> None:
    groups.get(name, {}).pop(connection, None)
    if not groups.get(name, True):
        del groups[name]


async def _has_begun(loop: asyncio.AbstractEventLoop, plain: socket.socket) -> bool:
    """Wait until something has come, or the other side has gone; whether something has."""
    came = asyncio.Event()
    loop.add_reader(plain.fileno(), came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(plain.fileno())
    try:
        return bool(plain.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def _network(address: str) -> str:
    """What of an address is one sender's: an IPv4 address, or a network of IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, _NETWORK), strict=False))


def listeners(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at all addresses of a host that this machine has. Raises OSError."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets, not_here = [], []
    for family, place in dict.fromkeys((info[0], info[4][:2]) for info in infos):
        try:
            listener = socket.create_server(place, family=family, backlog=2048)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            not_here.append(error)  # as ::1 of localhost where a machine has no IPv6
            continue
        listener.setblocking(False)
        sockets.append(listener)
    if not sockets:
        raise not_here[0]
    return sockets
