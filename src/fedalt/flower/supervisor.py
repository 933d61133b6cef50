"""`fedalt server`: Flower's server, the door before it and the federation's app, to the end.

Whatever of it dies is started again; the app goes on where its folder stands.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import httpx
import psutil
import tomli_w

from fedalt.core.files import atomic_write, make_private_folder, open_private
from fedalt.core.reading import read_text
from fedalt.flower.client_keys import ClientKeys, clients_by_key
from fedalt.flower.config import ServerConfig
from fedalt.flower.control import Control
from fedalt.flower.credentials import require_usable
from fedalt.flower.gateway import ENDED
from fedalt.flower.last_words import length, note, told_in
from fedalt.flower.processes import Group, free_port, group, require_free, shorten, wait_for_port
from fedalt.flower.signatures import write_keys
from fedalt.runs.folder import StoreError, locked

APP: Final = Path(__file__).parent / "app"
_START: Final = (
    180.0  # seconds that Flower's server or the app may take to come up on a busy machine
)
_LOOK: Final = 0.5
_AGAIN: Final = 2.0  # seconds before something that has died is started again
_MOST_DEATHS: Final = 6  # in a row, while nothing gets further
_LONG: Final = 300.0  # seconds; what has lived so long did not die at once
_NAME: Final = "federation"  # of the server in Flower's own configuration
_DOOR: Final = "the door"
_FLOWER: Final = "Flower's server"
# What an allocator keeps of a flood's buffers is not given back otherwise (glibc).
_GIVE_BACK: Final = {"MALLOC_MMAP_THRESHOLD_": "131072"}

Say = Callable[[str], None]


def supervise(config: ServerConfig, say: Say) -> None:
    """Keep the federation going to its end.

    Raises SettingsError or StoreError for what does not go away by starting again.
    """
    place = config.place
    clients_by_key(config)
    if not place.insecure:
        require_usable(place.certificate, place.key, place.authority)
    home = place.flower
    for each in (home, place.logs):
        make_private_folder(each)
    with (
        locked(home),
        group({"FLWR_HOME": str(home)}, home / "processes.json") as processes,
    ):
        require_free(place.address)
        if place.ended.exists():
            _tell_of_the_end(config, processes, say)
        place.failed.unlink(missing_ok=True)
        for log in ("flwr.log", "server.log", "app.log"):
            shorten(place.logs / log)
        patience = _Patience(config, _standing(config), time.monotonic())
        keys = _Keys(ClientKeys(config))
        while not place.ended.exists():
            try:
                _one_life(config, processes, patience, keys, say)
            except _DiedError as death:
                patience.died(str(death))
                say(f"{death}; starting again")
                time.sleep(_AGAIN)
            finally:
                processes.stop()


def _tell_of_the_end(config: ServerConfig, processes: Group, say: Say) -> NoReturn:
    """Tell clients that were away at the end, until stopped. Raises StoreError."""
    _open_door(processes, config, ENDED)
    say(
        f"the federation has ended; clients that call {config.place.address} are told so, "
        "until this is stopped (Ctrl-C)"
    )
    while processes.dead() is None:
        time.sleep(_LOOK)
    raise StoreError(f"{_DOOR} has ended, {processes.told(_DOOR)}")


class _DiedError(Exception):
    """A process has ended that should not have."""


@dataclass
class _Patience:
    """Counts what dies while nothing gets further, so that this has an end."""

    config: ServerConfig
    standing: object
    since: float
    deaths: int = 0

    def died(self, what: str) -> None:
        """Count a death. Raises StoreError where there were too many."""
        now, standing = time.monotonic(), _standing(self.config)
        if standing != self.standing or now - self.since > _LONG:
            self.deaths = 0
        self.standing, self.since = standing, now
        self.deaths += 1
        if self.deaths >= _MOST_DEATHS:
            raise StoreError(
                f"{what}; that was {self.deaths} deaths in a row without getting further"
            )


def _standing(config: ServerConfig) -> object:
    """What changes whenever the federation gets further."""
    run = config.place.run
    progress = run / "progress.json"
    return (
        progress.read_bytes() if progress.exists() else b"",
        sorted(each.name for each in (run / "incoming").glob("*/*")),
    )


@dataclass
class _Keys:
    """Tells Flower and the door whose keys are let in whenever the clients' folder has changed."""

    keys: ClientKeys
    told: frozenset[str] = frozenset()
    settled: object = None

    def settle(self, control: Control, say: Say) -> None:
        """Look at the folder, and tell once what is wrong with it.

        Raises `_DiedError` where Flower's server does not answer.
        """
        keys, before = self.keys, self.keys.troubles
        clients = dict(keys.now())
        for each in sorted((keys.troubles | keys.strays) - self.told):
            say(f"{each}; it is looked at again when that changes")
        if before and not keys.troubles:
            say("every client's key is in order again")
        self.told = keys.troubles | keys.strays
        known = set(keys.known.values())
        if (standing := (control, clients, known)) == self.settled:
            return
        write_keys(control.place.let_in, clients)
        try:
            control.let_in(clients, known, say)
        except httpx.HTTPError as error:
            raise _DiedError(f"{_FLOWER} does not answer: {error}") from error
        self.settled = standing


def _one_life(
    config: ServerConfig, processes: Group, patience: _Patience, keys: _Keys, say: Say
) -> None:
    """Start everything; return when the federation has ended, raise `_DiedError` otherwise."""
    place, logs = config.place, config.place.logs
    port = free_port()
    link = processes.start(_FLOWER, _superlink(config, port), logs / "superlink.log")
    if not wait_for_port(port, link, _START):
        raise _DiedError(f"{_FLOWER} did not come up, {processes.told(_FLOWER)}")
    _configure(place.flower, port, config)
    control = Control(port, place)
    keys.settle(control, say)
    _open_door(processes, config, port)
    say(f"listening at {place.address}{' WITHOUT ENCRYPTION' if place.insecure else ''}")
    told = length(logs / "server.log")
    while not place.ended.exists():
        written = length(place.app_log)
        _run(processes, config)
        while _alive(place.pid) and not place.ended.exists():
            name = processes.dead()
            if name == _DOOR:  # nobody else notices
                ended = f"{_DOOR} has ended, {processes.told(_DOOR)}"
                patience.died(ended)
                say(f"{ended}; starting it again")
                _open_door(processes, config, port)
            elif name is not None:
                raise _DiedError(f"{name} has ended, {processes.told(name)}")
            keys.settle(control, say)
            told = _tell(logs / "server.log", told, say)
            time.sleep(_LOOK)
        told = _tell(logs / "server.log", told, say)
        if place.failed.exists():
            raise StoreError(f"{read_text(place.failed)} (see {place.app_log})")
        if not place.ended.exists():
            ended = f"the app has ended before the federation, {told_in(place.app_log, written)}"
            patience.died(ended)
            say(f"{ended}; starting it again")


def _superlink(config: ServerConfig, port: int) -> list[str]:
    """It keeps no database: who may come in, and what is asked of whom, is said anew to each."""
    place = config.place
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    if place.insecure:
        return [*command, "--insecure"]
    return [
        *command,
        "--enable-supernode-auth",
        *("--ssl-ca-certfile", str(place.authority)),
        *("--ssl-certfile", str(place.certificate)),
        *("--ssl-keyfile", str(place.key)),
    ]


def _configure(home: Path, port: int, config: ServerConfig) -> None:
    """Tell Flower's commands where its server is."""
    place = config.place
    secure = {"root-certificates": str(place.authority)}
    about = {"address": f"127.0.0.1:{port}", **({"insecure": True} if place.insecure else secure)}
    text = tomli_w.dumps({"superlink": {_NAME: about}})
    atomic_write(home / "config.toml", text.encode())


def _open_door(processes: Group, config: ServerConfig, port: int | str) -> None:
    """Start what clients reach, before Flower's server at `port` or after the end."""
    place = config.place
    files = [] if place.insecure else [place.certificate, place.key, place.authority]
    words = [place.address, str(port), str(config.firewall.max_upload_bytes), *map(str, files)]
    words += ["--keyless", str(place.keyless)]
    words += ["--keyless-per-address", str(place.keyless_per_address)]
    words += ["--spool", str(place.flower)]
    if port != ENDED:
        words += ["--keys", str(place.let_in)]
    command = [sys.executable, "-m", "fedalt.flower.gateway", *words]
    processes.start(_DOOR, command, place.logs / "door.log", _GIVE_BACK)


def _run(processes: Group, config: ServerConfig) -> None:
    """Start the app and wait until it is there."""
    pid, log = config.place.pid, config.place.app_log
    pid.unlink(missing_ok=True)
    written = length(log)
    words = {"config": str(config.file), "log": str(log)}  # Flower takes no space around a "="
    settings = " ".join(f"{name}={json.dumps(each)}" for name, each in words.items())
    said = _flwr(processes, config, "run", str(APP), _NAME, "--run-config", settings)
    end = time.monotonic() + _START
    while not pid.exists():
        if (name := processes.dead()) is not None:
            raise _DiedError(f"{name} has ended, {processes.told(name)}")
        if time.monotonic() > end:
            if number := re.search(r"run (\d+)", said):  # it may have ended before it was ours
                note(log, _flwr(processes, config, "log", number[1], _NAME, "--show"))
            raise _DiedError(f"the app did not come up, {told_in(log, written)}")
        time.sleep(_LOOK)


def _flwr(processes: Group, config: ServerConfig, *words: str) -> str:
    """What one of Flower's commands says; it goes to a log too."""
    environment = {**os.environ, **processes.environment}
    command = shutil.which("flwr", path=environment["PATH"])
    assert command is not None  # it comes with the package that we have imported
    done = subprocess.run([command, *words], env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    log = config.place.logs / "flwr.log"
    with open_private(log, "a") as file:
        file.write(f"flwr {' '.join(words)}\n{said}")
    if done.returncode:
        raise _DiedError(f"`flwr {words[0]}` failed, see {log}")
    return said


def _alive(pid_file: Path) -> bool:
    """Whether the process still runs whose number a file holds."""
    text = read_text(pid_file)
    if not text.isdecimal():
        raise StoreError(f"{pid_file} is damaged: expected the number of a process, got {text!r}")
    pid = int(text)
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _tell(log: Path, told: int, say: Say) -> int:
    """Pass on what a log has gained; how far it was read."""
    if not log.exists():
        return told
    with log.open("rb") as file:
        file.seek(told)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        say(line)
    return told + len(whole)
