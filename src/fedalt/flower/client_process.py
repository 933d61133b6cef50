"""`fedalt client`: holds the model and answers calls until the federation has ended."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedalt.core.files import make_private_folder, open_private
from fedalt.core.foreign import shown
from fedalt.federation.call_checks import is_last
from fedalt.federation.client import Client
from fedalt.federation.owner_messages import Say
from fedalt.flower.config import ClientConfig, client_from
from fedalt.flower.credentials import require_client_credentials
from fedalt.flower.parent_pipe import Pipe, pipe_to, receive, send
from fedalt.flower.processes import QUIET
from fedalt.runs.folder import locked

_RETRY: Final = (1.0, 2.0, 5.0, 10.0)  # seconds to the next try
_REMIND: Final = 600.0  # seconds until the same trouble is reported again
_PERHAPS: Final = "; if the federation has ended, Ctrl-C stops this, and nothing is lost"
_LINE: Final = 600  # characters of a line at most
_NOT_LET_IN: Final = "[code: 2004]"  # Flower's words


def run_client(config: ClientConfig, say: Say) -> None:
    """Answer the server's calls to the end of the federation.

    Raises SettingsError or OSError for files that do not get better by trying again.
    """
    place = config.place
    authority = None if place.insecure else place.authority
    require_client_credentials(place.key, authority)  # before the model is loaded
    make_private_folder(place.folder)
    with locked(place.folder):
        reports = _Reports(lambda text: say(f"{place.name}: {shown(text, _LINE)}"))
        client = client_from(config, reports.progress)
        say(f"{place.name}: the model is loaded, calling {place.server}")
        tries, node = 0, ""
        while True:
            require_client_credentials(place.key, authority)
            with _connection(config, node) as (pipe, log):
                connected, ended = _answer_calls(client, pipe, reports)
            if ended:
                say(f"{place.name}: the federation has ended")
                return
            tries, node = (0, connected) if connected else (tries, node)
            reports.trouble("lost the server; trying again" if connected else _why(log))
            time.sleep(_RETRY[min(tries, len(_RETRY) - 1)])
            tries += 1


@dataclass
class _Reports:
    """Tells the owner what happens; the same thing again only after a while."""

    say: Say
    last: dict[str, tuple[str, float]] = field(default_factory=dict)  # by kind: text, when

    def trouble(self, text: str) -> None:
        """Say what hinders; where it lasts, also what to do about it."""
        before, _ = self.last.get("trouble", ("", 0.0))
        self._say_once("trouble", text, _PERHAPS if text == before else "")

    def progress(self, text: str) -> None:
        """Say what happens."""
        self._say_once("progress", text)

    def connected(self) -> None:
        """Say that the trouble is over."""
        self.say("connected")
        self.last.pop("trouble", None)

    def _say_once(self, kind: str, text: str, more: str = "") -> None:
        before, when = self.last.get(kind, ("", 0.0))
        if text != before or time.monotonic() - when > _REMIND:
            self.say(text + more)
            self.last[kind] = text, time.monotonic()


def _answer_calls(client: Client, pipe: Pipe, reports: _Reports) -> tuple[str, bool]:
    """Answer until the connection is over: as which node, if at all, and whether all has ended."""
    node, last = "", False
    while True:
        try:
            kind, data = receive(pipe)
            match kind:
                case "connected":
                    node = data.decode()
                    reports.connected()
                case "trouble":
                    reports.trouble(f"{data.decode(errors='replace')}; trying again")
                case "call":
                    answer = client.answer(data)
                    last = is_last(data, answer)
                    send(pipe, "answer", answer)
                case "delivered" if last:
                    return node, True
                case "ended":
                    return node, True
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return node, False


@contextmanager
def _connection(config: ClientConfig, node: str) -> Iterator[tuple[Pipe, Path]]:
    """Run the process that holds the connection; our end of the pipe to it, and its log.

    `node` is what the last connection was to the server, "" if there was none.
    """
    place = config.place
    log = place.folder / "link.log"
    authority = "-" if place.insecure else str(place.authority)
    words = [place.server, str(place.key), authority, *filter(None, [node])]
    with open_private(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedalt.flower.fleet_client", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, **QUIET},
            start_new_session=True,
        )
    pipe = pipe_to(process)
    try:
        yield pipe, log
    finally:
        for stream in (pipe.outgoing, pipe.incoming):
            with contextlib.suppress(BrokenPipeError):  # what cannot be sent any more
                stream.close()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _why(log: Path) -> str:
    """Why there was no connection; in our own words where the server does not let us in."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    if any(_NOT_LET_IN in line for line in lines):
        return (
            "the server does not let this client in: its key is not known or was revoked, or its "
            "last connection broke off less than a minute ago; or another machine is connected "
            "with the same key: a key is for one machine; trying again"
        )
    errors = [line for line in lines if "rror" in line]
    text = (errors or lines or ["the connection failed"])[-1][:300]
    return f"{text} (see {log}); trying again"
