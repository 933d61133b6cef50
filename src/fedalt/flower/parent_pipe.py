"""Messages between `fedalt client` and the process that holds its connection to the server."""

from multiprocessing.connection import Connection
from typing import Literal

Kind = Literal["connected", "call", "answer", "delivered", "trouble", "ended"]
Pipe = Connection


def send(pipe: "Pipe", kind: Kind, data: bytes = b"") -> None:
    """Send one message; bytes only, as nothing that a server sends may be unpickled."""
    pipe.send_bytes(kind.encode())
    pipe.send_bytes(data)


def receive(pipe: "Pipe") -> tuple[str, bytes]:
    """The next message; EOFError where the other side has closed."""
    return pipe.recv_bytes().decode(), pipe.recv_bytes()
