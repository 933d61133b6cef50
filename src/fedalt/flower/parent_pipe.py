"""Messages between `fedalt client` and the process that holds its connection to the server."""

import os
import subprocess
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

Kind = Literal["connected", "call", "answer", "delivered", "trouble", "ended"]


@dataclass(frozen=True)
class Pipe:
    """One end: what comes from the other side, and what goes there."""

    incoming: BinaryIO
    outgoing: BinaryIO


def pipe_to(process: "subprocess.Popen[bytes]") -> Pipe:
    """The parent's end, of a process whose stdin and stdout are pipes."""
    return Pipe(cast(BinaryIO, process.stdout), cast(BinaryIO, process.stdin))


def pipe_to_parent() -> Pipe:
    """The process's own end; whatever else it prints goes to stderr from now on."""
    pipe = Pipe(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    return pipe


def send(pipe: Pipe, kind: Kind, data: bytes = b"") -> None:
    """Send one message; bytes only, as nothing that a server sends may be unpickled."""
    for part in (kind.encode(), data):
        pipe.outgoing.write(len(part).to_bytes(8))
        pipe.outgoing.write(part)
    pipe.outgoing.flush()


def receive(pipe: Pipe) -> tuple[str, bytes]:
    """The next message; EOFError where the other side has closed."""
    return _part(pipe.incoming).decode(), _part(pipe.incoming)


def _part(stream: BinaryIO) -> bytes:
    return _exactly(stream, int.from_bytes(_exactly(stream, 8)))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
