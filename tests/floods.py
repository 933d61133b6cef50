"""Connections of strangers to a federation's server, of every kind: none of them has a key.

All of them go to loopback, from as many of its addresses as are asked for (127.0.0.x, on Linux).
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from access import signed
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key

from fedalt.flower.gateway import LARGEST_REQUEST

PATIENCE = 5.0  # seconds for a step of a stranger
BODY = 4 * 2**20  # bytes of a large body that a stranger tries to send


@dataclass
class Flood:
    """Strangers at a server's address, host:port, whose authority is a file (None: no TLS)."""

    address: str
    authority: Path | None
    sources: Sequence[str] = ("127.0.0.1",)
    open: list[socket.socket] = field(default_factory=list)
    tried: dict[str, int] = field(default_factory=dict)

    def send(self, kind: str, count: int) -> None:
        """Let so many strangers of a kind come, who stay as long as they are let."""
        for _ in range(count):
            source = self.sources[sum(self.tried.values()) % len(self.sources)]
            self.tried[kind] = self.tried.get(kind, 0) + 1
            with contextlib.suppress(OSError):  # it was dropped already
                KINDS[kind](self, self._call(source))

    def _call(self, source: str) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        one = socket.create_connection((host, int(port)), PATIENCE, (source, 0))
        self.open.append(one)
        return one

    def secure(self, plain: socket.socket) -> socket.socket:
        """With TLS on it, whole."""
        if self.authority is None:
            return plain
        host = self.address.rpartition(":")[0]
        one = _context(self.authority).wrap_socket(plain, server_hostname=host)
        self.open[-1] = one
        return one

    def keep_alive(self, seconds: float) -> None:
        """Send a byte over each connection now and then: a slow stranger who goes on."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for one in self.open:
                with contextlib.suppress(OSError):
                    one.settimeout(0.01)
                    one.send(b"a")
            time.sleep(1.0)

    def close(self) -> None:
        """All of them go."""
        for one in self.open:
            one.close()
        self.open.clear()


_CONTEXTS: dict[Path, ssl.SSLContext] = {}


def _context(authority: Path) -> ssl.SSLContext:
    if authority not in _CONTEXTS:
        _CONTEXTS[authority] = ssl.create_default_context(cafile=authority)
    return _CONTEXTS[authority]


def _head(length: int | None, headers: dict[str, str] | None = None) -> bytes:
    lines = ["POST /v1/fleet/push-object HTTP/1.1", "Host: server"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += ["Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _idle(_: Flood, __: socket.socket) -> None:
    """It connects and is silent."""


def _half_hello(_: Flood, one: socket.socket) -> None:
    one.sendall(bytes.fromhex("1603010200010001fc0303") + bytes(100))


def _no_tls(_: Flood, one: socket.socket) -> None:
    one.sendall(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n")


def _tls_only(flood: Flood, one: socket.socket) -> None:
    flood.secure(one)


def _slow_headers(flood: Flood, one: socket.socket) -> None:
    flood.secure(one).sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: server\r\nX: aaa")


def _endless_headers(flood: Flood, one: socket.socket) -> None:
    one = flood.secure(one)
    one.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\n")
    for _ in range(BODY // 2**16):
        one.sendall(b"X: " + b"a" * 2**16 + b"\r\n")


def _half_request(flood: Flood, one: socket.socket) -> None:
    flood.secure(one).sendall(_head(1000) + b"a")


def _large_body(flood: Flood, one: socket.socket) -> None:
    one = flood.secure(one)
    one.sendall(_head(LARGEST_REQUEST))
    one.sendall(bytes(BODY))


def _chunked_body(flood: Flood, one: socket.socket) -> None:
    one = flood.secure(one)
    one.sendall(_head(None))
    for _ in range(BODY // 2**16):
        one.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")


def _wrong_key(flood: Flood, one: socket.socket) -> None:
    one = flood.secure(one)
    one.sendall(_head(LARGEST_REQUEST, signed(generate_private_key(SECP384R1()))))
    one.sendall(bytes(BODY))


KINDS: dict[str, Callable[[Flood, socket.socket], None]] = {
    "idle, no TLS begun": _idle,
    "half a TLS greeting": _half_hello,
    "plain HTTP": _no_tls,
    "TLS and nothing else": _tls_only,
    "headers that do not end": _slow_headers,
    "4 MiB of headers": _endless_headers,
    "half a small body": _half_request,
    "a large body": _large_body,
    "a large body in chunks": _chunked_body,
    "a large body with a wrong key": _wrong_key,
}


@contextmanager
def flooded(
    address: str, authority: Path | None, each: int, sources: Sequence[str] = ("127.0.0.1",)
) -> Iterator[Flood]:
    """So many strangers of each kind, who go at the end of the context."""
    flood = Flood(address, authority, sources)
    try:
        for kind in KINDS:
            flood.send(kind, each)
        yield flood
    finally:
        flood.close()


def seconds_to_greet(address: str, authority: Path | None) -> float:
    """How long an honest newcomer waits for the server's greeting over a new connection."""
    began = time.monotonic()
    verify: ssl.SSLContext | bool = True if authority is None else _context(authority)
    scheme = "http" if authority is None else "https"
    answer = httpx.get(f"{scheme}://{address}/", verify=verify, timeout=30)
    assert answer.status_code == 200
    return time.monotonic() - began
