"""What ends a process of the server is in a file that is named, and its last line is quoted."""

import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machines, found, wait_for
from runs_for_tests import save_model

from fedalt.flower import supervisor
from fedalt.flower.config import read_server_config
from fedalt.flower.crash_log import last_line, recording_crashes
from fedalt.flower.processes import process_group
from fedalt.runs.folder import StoreError


@pytest.mark.parametrize("ends", [ValueError, OSError, MemoryError, SystemExit, KeyboardInterrupt])
def test_whatever_ends_the_app_is_written_down_for_its_user_alone(
    tmp_path: Path, ends: type[BaseException]
) -> None:
    log = tmp_path / "logs" / "app.log"
    with pytest.raises(ends), recording_crashes(log):
        raise ends("the disk \x1b[31mis full")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "Traceback (most recent call last)" in log.read_text()
    assert last_line(log).startswith(f"see {log}: {ends.__name__}: the disk  [31mis full")
    assert last_line(log, log.stat().st_size) == f"see {log}, where it left no message"


def test_a_crash_without_an_exception_is_written_down_too(tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    code = f"""
import os, pathlib, signal
from fedalt.flower.crash_log import recording_crashes
with recording_crashes(pathlib.Path({str(log)!r})):
    os.kill(os.getpid(), signal.SIGSEGV)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode < 0
    assert f"see {log}: Fatal Python error: Segmentation fault" in last_line(log)


def test_where_nothing_can_be_written_the_app_ends_as_it_would_have(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    with pytest.raises(ZeroDivisionError), recording_crashes(tmp_path / "logs" / "app.log"):
        _ = 1 / 0
    assert last_line(tmp_path / "logs" / "app.log").endswith("where it left no message")


def test_a_full_disk_is_told_though_nothing_could_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "app.log"
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert last_line(log) == f"see {log}, where it left no message: its disk is full"
    log.write_text("OSError: why\n")
    assert last_line(log) == f"see {log}: OSError: why"


def test_of_a_long_log_only_the_end_is_read_and_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"RuntimeError: old\n" + b"x" * 10**6 + b"\nlast \xff line" + b"y" * 10**4)
    assert last_line(log) == f"see {log}: {'last � line' + 'y' * 289}"


def test_a_group_tells_what_a_process_said_since_it_was_started(tmp_path: Path) -> None:
    log = tmp_path / "some.log"
    log.write_text("RuntimeError: yesterday\n")
    with process_group({}, tmp_path / "register.json") as processes:
        processes.start("it", [sys.executable, "-c", "raise SystemError('now')"], log).wait()
        assert processes.last_line("it") == f"see {log}: SystemError: now"
        processes.start("it", [sys.executable, "-c", ""], log).wait()
        assert processes.last_line("it") == f"see {log}, where it left no message"


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = found(tmp_path, save_model(tmp_path / "model"), ("a", "b"), rounds={"rounds": 2})
    try:
        yield made
    finally:
        made.kill_all()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_app_that_cannot_go_on_is_started_again_and_says_why(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_MOST_DEATHS", 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = read_server_config(machines.server / "federation.toml")
    config.place.logs.mkdir(parents=True)
    broken = config.place.logs / "server.log"
    broken.symlink_to(broken)  # nothing can be written there
    said: list[str] = []
    with pytest.raises(StoreError) as error:
        supervisor.supervise(config, said.append)
    log = config.place.app_log
    quoted = f"see {log}: OSError: [Errno 40] Too many levels of symbolic links: '"
    again = [line for line in said if line.endswith("; starting it again")]
    assert [f"the app has ended before the federation, {quoted}" in each for each in again] == [
        True
    ]
    assert f"{quoted}{broken}'" in str(error.value)
    assert str(error.value).endswith("that was 2 deaths in a row without getting further")
    assert log.read_text().count("Traceback (most recent call last)") == 2
    wait_for(lambda: machines.processes() == [], "the end of all processes")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
