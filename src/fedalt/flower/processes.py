"""Processes that belong together: started, watched, and none left behind."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

import psutil

from fedalt.core.files import atomic_write, make_private_folder, open_private
from fedalt.core.reading import StoreError, read_json, read_text
from fedalt.flower.addresses import host_and_port
from fedalt.flower.connections import listeners
from fedalt.flower.crash_log import last_line, length
from fedalt.runs.settings import SettingsError

_POLITE: Final = 5.0  # seconds from asking a process to end to killing it
_APART: Final = 0.005  # seconds; the system counts in hundredths
_LONGEST_LOG: Final = 10 * 2**20  # bytes; a longer one is begun anew, and one old one is kept

# Flower counts its users and asks for updates unless told otherwise.
QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class ProcessDiedError(Exception):
    """A process has ended that should not have."""


@dataclass
class ProcessGroup:
    """Processes by name, and everything that they have started themselves."""

    environment: Mapping[str, str]
    register: Path  # who they are, for the next group to end if we are killed
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _logs: dict[str, tuple[Path, int]] = field(default_factory=dict)  # and how long one was
    _seen: dict[int, psutil.Process] = field(default_factory=dict)

    def start(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to the end of a file."""
        make_private_folder(log.parent)
        shorten(log)
        self._logs[name] = log, length(log)
        with open_private(log, "ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, **environment},
                start_new_session=True,  # Ctrl-C is for us alone; we end them in order
            )
        self.running[name] = process
        self.dead()  # whoever comes after us knows of it, if we are killed
        return process

    def dead(self) -> str | None:
        """The name of a process that has ended; also notes whom the others have started."""
        for process in self.running.values():
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                family = [parent, *parent.children(recursive=True)]
                self._seen |= {member.pid: member for member in family}
        self._write()
        ended = (name for name, process in self.running.items() if process.poll() is not None)
        return next(ended, None)

    def death(self, name: str) -> str:
        """That a process has ended, where its log lies, and the last line of that."""
        return f"{name} has ended, {self.last_line(name)}"

    def require_alive(self) -> None:
        """Raise ProcessDiedError where one has ended."""
        if (name := self.dead()) is not None:
            raise ProcessDiedError(self.death(name))

    def last_line(self, name: str) -> str:
        """Where a process writes, and the last line since it was started."""
        return last_line(*self._logs[name])

    def stop(self) -> None:
        """End all of them, and what they have started."""
        self.dead()
        _end(list(self._seen.values()))
        for process in self.running.values():
            process.wait()
        self.running.clear()
        self._seen.clear()
        self._write()

    def _write(self) -> None:
        born = {}
        for process in self._seen.values():
            with contextlib.suppress(psutil.Error):
                if process.is_running():
                    born[str(process.pid)] = _begun(process.pid)
        if not self.register.exists() or read_json(self.register, dict[str, float]) != born:
            atomic_write(self.register, json.dumps(born).encode())


def shorten(log: Path) -> None:
    """Put a log aside that has become long; nobody may be writing it."""
    if log.exists() and log.stat().st_size > _LONGEST_LOG:
        log.replace(log.with_name(f"{log.name}.old"))


def end_leftovers(register: Path) -> None:
    """End the processes of a group whose own process was killed.

    Raises StoreError where that process runs: the folder is then a copy of the one it works in.
    """
    if not register.exists():
        return
    if (owner := _owner(register)).exists() and is_running(owner):
        raise StoreError(
            f"{register.parent} is a copy of a folder in which process "
            f"{read_text(owner).partition(' ')[0]} runs; stop that one first"
        )
    left = []
    for pid, born in read_json(register, dict[str, float]).items():
        if not pid.isdecimal():
            raise StoreError(f"{register} is damaged: expected numbers of processes, got {pid!r}")
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if _is_same(process, born):  # the number may be another's by now
                left += [process, *process.children(recursive=True)]
    _end(left)
    register.unlink()


def _end(processes: Sequence[psutil.Process]) -> None:
    alive = [process for process in processes if process.is_running()]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.Error):
                end(process)
        _, alive = psutil.wait_procs(alive, timeout=_POLITE)


def _owner(register: Path) -> Path:
    """Where the process is noted whose group a register is of."""
    return register.with_suffix(".pid")


@contextmanager
def process_group(environment: Mapping[str, str], register: Path) -> Iterator[ProcessGroup]:
    """Processes that end with this context, however it is left."""
    # Flower's commands lie beside this Python's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    end_leftovers(register)
    write_pid(_owner(register))
    group = ProcessGroup({**QUIET, "PATH": path, **environment}, register)
    try:
        yield group
    finally:
        group.stop()
        _owner(register).unlink(missing_ok=True)


def write_pid(pid_file: Path) -> None:
    """Note which process this is, for `is_running`."""
    atomic_write(pid_file, f"{os.getpid()} {_begun(os.getpid()):.6f}".encode())


def is_running(pid_file: Path) -> bool:
    """Whether the process runs that has written a file by `write_pid`. Raises StoreError."""
    pid, _, begun = (text := read_text(pid_file)).partition(" ")
    if not pid.isdecimal() or not begun.replace(".", "", 1).isdecimal():
        raise StoreError(
            f"{pid_file} is damaged: expected the number of a process and when it began, "
            f"got {text!r}"
        )
    try:
        process = psutil.Process(int(pid))
        return _is_same(process, float(begun)) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _begun(pid: int) -> float:
    """Seconds from the start of the machine to that of a process: no clock set anew changes them.

    Of the time of day, which is what psutil tells, both ends are moved.
    """
    while True:
        boot = psutil.boot_time()
        begun = psutil.Process(pid).create_time() - boot  # which an older object would remember
        if psutil.boot_time() == boot:
            return float(begun)


def _is_same(process: psutil.Process, begun: float) -> bool:
    """Whether it is the process that began then, and not another one with its number."""
    return abs(_begun(process.pid) - begun) < _APART


def require_free(address: str) -> None:
    """Refuse an address, host:port, at which nobody can listen. Raises SettingsError."""
    try:
        for listener in listeners(*host_and_port(address)):
            listener.close()
    except OSError as error:
        raise SettingsError(f"address {address!r}: {error}") from None


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether somebody listens at a loopback port before the process ends or time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.1)
    return False
