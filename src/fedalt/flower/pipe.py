"""Pieces of bytes over a pair of sockets between a process and the one that it has started."""

import socket
import struct
from typing import Final, Literal

Kind = Literal["connected", "call", "answer", "delivered", "trouble", "ended"]
_KINDS: Final[tuple[Kind, ...]] = ("connected", "call", "answer", "delivered", "trouble", "ended")
_HEAD = struct.Struct("!BQ")  # kind, length


def send(pair: socket.socket, kind: Kind, data: bytes = b"") -> None:
    """Send one piece."""
    pair.sendall(_HEAD.pack(_KINDS.index(kind), len(data)))
    pair.sendall(data)


def receive(pair: socket.socket) -> tuple[Kind, bytes]:
    """The next piece; EOFError where the other side has closed."""
    kind, length = _HEAD.unpack(_exactly(pair, _HEAD.size))
    return _KINDS[kind], _exactly(pair, length)


def _exactly(pair: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = pair.recv(min(length - len(data), 2**20))
        if not part:
            raise EOFError("the other side has closed")
        data += part
    return bytes(data)
