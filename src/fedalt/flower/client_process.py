"""`fedalt client`: holds the model and answers calls until the federation has ended."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedalt.core.files import make_private_folder, open_private
from fedalt.core.foreign import shown
from fedalt.federation.client import Client, OnEvent, ignore, is_last
from fedalt.flower.config import ClientConfig, member_of
from fedalt.flower.pipe import receive, send
from fedalt.flower.processes import QUIET
from fedalt.runs.folder import locked

_AGAIN: Final = (1.0, 2.0, 5.0, 10.0)  # seconds to the next try
_REMIND: Final = 600.0  # seconds until the same trouble is told again
_PERHAPS: Final = "; if the federation has ended, Ctrl-C stops this, and nothing is lost"
_LONGEST: Final = 600  # characters of a line
_NOT_LET_IN: Final = "[code: 2004]"  # Flower's words

Say = Callable[[str], None]


def attend(config: ClientConfig, say: Say, on_event: OnEvent = ignore) -> None:
    """Answer the server's calls to the end of the federation."""
    place = config.place
    needed = [place.key] if place.insecure else [place.key, place.authority]
    for each in needed:
        each.read_bytes()  # OSError names the file
    make_private_folder(place.folder)
    with locked(place.folder):
        troubles = _Troubles(lambda text: say(f"{place.name}: {shown(text, _LONGEST)}"))
        member = member_of(config, on_event, troubles.line)
        say(f"{place.name}: the model is loaded, calling {place.server}")
        tries, node = 0, ""
        while True:
            with _link(config, node) as (pair, log):
                connected, ended = _answer(member, pair, troubles)
            if ended:
                say(f"{place.name}: the federation has ended")
                return
            tries, node = (0, connected) if connected else (tries, node)
            troubles.tell("lost the server; trying again" if connected else _why(log))
            time.sleep(_AGAIN[min(tries, len(_AGAIN) - 1)])
            tries += 1


@dataclass
class _Troubles:
    """Says what is wrong once, and again after a while, however often it is tried."""

    say: Say
    last: str = ""
    told: float = 0.0
    line_before: str = ""
    line_told: float = 0.0

    def tell(self, text: str) -> None:
        """Say what hinders, unless that was just said."""
        if text != self.last or time.monotonic() - self.told > _REMIND:
            self.say(text + (_PERHAPS if text == self.last else ""))
            self.last, self.told = text, time.monotonic()

    def line(self, text: str) -> None:
        """Say what happens; the same thing again only after a while."""
        if text != self.line_before or time.monotonic() - self.line_told > _REMIND:
            self.say(text)
            self.line_before, self.line_told = text, time.monotonic()

    def over(self, text: str) -> None:
        """Say that it goes on."""
        self.say(text)
        self.last = ""


def _answer(member: Client, pair: socket.socket, troubles: _Troubles) -> tuple[str, bool]:
    """Answer until the connection is over: as which node, if at all, and whether all has ended."""
    connected, last = "", False
    while True:
        try:
            kind, data = receive(pair)
            match kind:
                case "connected":
                    connected = data.decode()
                    troubles.over("connected")
                case "trouble":
                    troubles.tell(f"{data.decode(errors='replace')}; trying again")
                case "call":
                    answer = member.answer(data)
                    last = is_last(data, answer)
                    send(pair, "answer", answer)
                case "delivered" if last:
                    return connected, True
                case "ended":
                    return connected, True
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return connected, False


@contextmanager
def _link(config: ClientConfig, node: str) -> Iterator[tuple[socket.socket, Path]]:
    """The process that holds the connection, and our end of the pipe to it.

    `node` is what the last one was to the server, "" if there was none.
    """
    place = config.place
    ours, theirs = socket.socketpair()
    log = place.folder / "link.log"
    authority = "-" if place.insecure else str(place.authority)
    words = [str(theirs.fileno()), place.server, str(place.key), authority, *filter(None, [node])]
    with open_private(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedalt.flower.fleet_client", *words],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **QUIET},
            start_new_session=True,
        )
    theirs.close()
    try:
        yield ours, log
    finally:
        ours.close()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _why(log: Path) -> str:
    """What a link said before it gave up, in our words where it was told that it is not let in."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    if any(_NOT_LET_IN in line for line in lines):
        return (
            "the server does not let this client in: its key is not known or was revoked, or its "
            "last connection broke off less than a minute ago; or another machine is connected "
            "with the same key: a key is for one machine; trying again"
        )
    told = [line for line in lines if "rror" in line]
    said = (told or lines or ["the connection failed"])[-1][:300]
    return f"{said} (see {log}); trying again"
