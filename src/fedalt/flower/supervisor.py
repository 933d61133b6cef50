"""`fedalt server`: Flower's server, the gateway before it and the federation's app, to the end.

Whatever of it dies is started again; the app goes on where its folder stands.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import tomli_w

from fedalt.core.files import atomic_write, make_private_folder, open_private
from fedalt.core.reading import PassingError, read_text
from fedalt.federation.owner_messages import Say
from fedalt.flower.addresses import host_and_port, listens_only
from fedalt.flower.admission import Admission
from fedalt.flower.client_keys import ClientKeys, clients_by_key
from fedalt.flower.config import ServerConfig
from fedalt.flower.crash_log import append, last_line, length
from fedalt.flower.credentials import names_host, require_server_credentials
from fedalt.flower.gateway import ENDED
from fedalt.flower.processes import (
    ProcessDiedError,
    ProcessGroup,
    free_port,
    is_running,
    process_group,
    require_free,
    shorten,
    wait_for_port,
)
from fedalt.flower.proxies import reach_loopback_directly
from fedalt.runs.folder import StoreError, locked

APP: Final = Path(__file__).parent / "app"
_START: Final = 180.0  # seconds that Flower's server or the app may take on a busy machine
_LOOK: Final = 0.5  # seconds between two looks
_RESTART: Final = 2.0  # seconds before something that has died is started again
_MOST_DEATHS: Final = 6  # in a row, while nothing gets further
_LONG: Final = 300.0  # seconds; what has lived so long did not die at once
_FLOWERS_HOST: Final = "127.0.0.1"
_NAME: Final = "federation"  # of the server in Flower's own configuration
_GATEWAY: Final = "the gateway"
_FLOWER: Final = "Flower's server"
# What an allocator keeps of a flood's buffers is not given back otherwise (glibc).
_GIVE_BACK: Final = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def supervise(config: ServerConfig, say: Say) -> None:
    """Keep the federation going to its end.

    Raises SettingsError or StoreError for what does not go away by starting again, PassingError for
    what may.
    """
    place = config.place
    reach_loopback_directly(_FLOWERS_HOST)
    clients_by_key(config)
    if not place.insecure:
        require_server_credentials(place.certificate, place.key, place.authority)
        host, _ = host_and_port(place.address)
        if not listens_only(place.address) and not names_host(place.certificate, host):
            say(f"{place.certificate} does not name {host}; who calls that address refuses it")
    for folder in (place.flower, place.logs):
        make_private_folder(folder)
    with (
        locked(place.flower),
        process_group(
            {"FLWR_HOME": str(place.flower)}, place.flower / "processes.json"
        ) as processes,
    ):
        require_free(place.address)
        supervision = _Supervision(config, processes, say)
        if place.ended.exists():
            supervision.tell_of_the_end()
        place.failed.unlink(missing_ok=True)
        for log in ("flwr.log", "server.log", "app.log"):
            shorten(place.logs / log)
        patience = Patience(config, progress_of(config), time.monotonic())
        admission = Admission(ClientKeys(config))
        while not place.ended.exists():
            try:
                supervision.live(patience, admission)
            except ProcessDiedError as death:
                patience.died(str(death))
                say(f"{death}; starting again")
                time.sleep(_RESTART)
            finally:
                processes.stop()


@dataclass
class Patience:
    """Counts what dies while nothing gets further, so that this has an end."""

    config: ServerConfig
    progress: object
    since: float
    deaths: int = 0

    def died(self, what: str) -> None:
        """Count a death. Raises PassingError where there were too many."""
        now, progress = time.monotonic(), progress_of(self.config)
        if progress != self.progress or now - self.since > _LONG:
            self.deaths = 0
        self.progress, self.since = progress, now
        self.deaths += 1
        if self.deaths >= _MOST_DEATHS:
            raise PassingError(
                f"{what}; that was {self.deaths} deaths in a row without getting further"
            )


def progress_of(config: ServerConfig) -> object:
    """What changes whenever the federation gets further."""
    run = config.place.run
    progress = run / "progress.json"
    return (
        progress.read_bytes() if progress.exists() else b"",
        sorted(answer.name for answer in (run / "incoming").rglob("*")),  # of a sum's steps, too
    )


@dataclass(frozen=True)
class _Supervision:
    """Starts the processes of a server and watches them."""

    config: ServerConfig
    processes: ProcessGroup
    say: Say

    def live(self, patience: Patience, admission: Admission) -> None:
        """Start everything; return when the federation has ended.

        Raises ProcessDiedError where all has to be started again.
        """
        place, server_log = self.config.place, self.config.place.logs / "server.log"
        port = self._start_flower()
        admission.update(port, self.say)
        self._start_gateway(port)
        without = " WITHOUT ENCRYPTION" if place.insecure else ""
        self.say(f"listening at {place.address}{without}")
        read = length(server_log)
        while not place.ended.exists():
            written = length(place.app_log)
            self._start_app()
            while is_running(place.pid) and not place.ended.exists():
                name = self.processes.dead()
                if name == _GATEWAY:  # nobody else notices
                    death = self.processes.death(_GATEWAY)
                    patience.died(death)
                    self.say(f"{death}; starting it again")
                    self._start_gateway(port)
                elif name is not None:
                    raise ProcessDiedError(self.processes.death(name))
                admission.update(port, self.say)
                read = _pass_on(server_log, read, self.say)
                time.sleep(_LOOK)
            read = _pass_on(server_log, read, self.say)
            if place.failed.exists():
                raise StoreError(f"{read_text(place.failed)} (see {place.app_log})")
            if not place.ended.exists():
                line = last_line(place.app_log, written)
                death = f"the app has ended before the federation, {line}"
                patience.died(death)
                self.say(f"{death}; starting it again")

    def tell_of_the_end(self) -> NoReturn:
        """Tell clients that were away at the end, until stopped. Raises PassingError."""
        self._start_gateway(ENDED)
        self.say(
            f"the federation has ended; clients that call {self.config.place.address} are told "
            "so, until this is stopped (Ctrl-C)"
        )
        while self.processes.dead() is None:
            time.sleep(_LOOK)
        raise PassingError(self.processes.death(_GATEWAY))

    def _start_flower(self) -> int:
        """Start Flower's server at a port of loopback.

        It keeps no database: who may come in, and what is asked of whom, is said anew to each.
        """
        place, port = self.config.place, free_port()
        command = ["flower-superlink", "--host", _FLOWERS_HOST, "--port", str(port)]
        command += ["--disable-runtime-dependency-installation"]
        client: dict[str, object] = {"address": f"{_FLOWERS_HOST}:{port}"}
        if place.insecure:
            command += ["--insecure"]
            client["insecure"] = True
        else:
            command += ["--enable-supernode-auth", "--ssl-ca-certfile", str(place.authority)]
            command += ["--ssl-certfile", str(place.certificate), "--ssl-keyfile", str(place.key)]
            client["root-certificates"] = str(place.authority)
        process = self.processes.start(_FLOWER, command, place.logs / "superlink.log")
        if not wait_for_port(port, process, _START):
            raise ProcessDiedError(
                f"{_FLOWER} did not come up, {self.processes.last_line(_FLOWER)}"
            )
        text = tomli_w.dumps({"superlink": {_NAME: client}})
        atomic_write(place.flower / "config.toml", text.encode())  # where Flower's commands look
        return port

    def _start_gateway(self, port: int | str) -> None:
        """Start what clients reach, before Flower's server at `port` or after the end."""
        place = self.config.place
        files = [] if place.insecure else [place.certificate, place.key, place.authority]
        command = [sys.executable, "-m", "fedalt.flower.gateway", place.address, str(port)]
        command += [str(self.config.firewall.max_upload_bytes), *map(str, files)]
        command += ["--keyless", str(place.keyless)]
        command += ["--keyless-per-address", str(place.keyless_per_address)]
        command += ["--spool", str(place.flower)]
        if port != ENDED:
            command += ["--keys", str(place.let_in)]
        self.processes.start(_GATEWAY, command, place.logs / "gateway.log", _GIVE_BACK)

    def _start_app(self) -> None:
        """Start the app and wait until it is there."""
        pid, log = self.config.place.pid, self.config.place.app_log
        pid.unlink(missing_ok=True)
        written = length(log)
        words = {"config": str(self.config.file), "log": str(log)}
        # Flower takes no space around a "=".
        settings = " ".join(f"{name}={json.dumps(value)}" for name, value in words.items())
        output = self._flwr("run", str(APP), _NAME, "--run-config", settings)
        end = time.monotonic() + _START
        while not pid.exists():
            self.processes.require_alive()
            if time.monotonic() > end:
                if number := re.search(r"run (\d+)", output):  # it may have ended before
                    append(log, self._flwr("log", number[1], _NAME, "--show"))
                raise ProcessDiedError(f"the app did not come up, {last_line(log, written)}")
            time.sleep(_LOOK)

    def _flwr(self, *words: str) -> str:
        """The output of one of Flower's commands; it goes to a log too."""
        environment = {**os.environ, **self.processes.environment}
        command = shutil.which("flwr", path=environment["PATH"])
        assert command is not None  # it comes with the package that we have imported
        done = subprocess.run([command, *words], env=environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        log = self.config.place.logs / "flwr.log"
        with open_private(log, "a") as file:
            file.write(f"flwr {' '.join(words)}\n{output}")
        if done.returncode:
            raise ProcessDiedError(f"`flwr {words[0]}` failed, see {log}")
        return output


def _pass_on(log: Path, read: int, say: Say) -> int:
    """Say the whole lines that a log has gained; how far it was read."""
    if not log.exists():
        return read
    with log.open("rb") as file:
        file.seek(read)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        say(line)
    return read + len(whole)
