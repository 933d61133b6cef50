"""A file is replaced whole or not at all."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread, get_ident

import pytest

from fedalt.core.files import atomic_write, make_private_folder, open_private, writing_behind
from fedalt.engine.schedule import Progress
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import RunFolder
from fedalt.training.orders import Moments


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_file_and_its_folders_are_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_private_folder(tmp_path / "a" / "b")
        atomic_write(tmp_path / "a" / "b" / "state", b"")
        with open_private(tmp_path / "a" / "log", "a") as file:
            file.write("said")
    finally:
        os.umask(before)
    for each in tmp_path.rglob("*"):
        assert stat.S_IMODE(each.stat().st_mode) == (0o700 if each.is_dir() else 0o600), each


@pytest.mark.parametrize("size", [5_000, 500_000])
def test_a_disk_without_room_leaves_the_old_file_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "state"
    atomic_write(path, b"old")
    with room_for(4096), pytest.raises(OSError, match=str(path)) as caught:
        atomic_write(path, bytes(size))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*args: object) -> None:
        raise error

    path = tmp_path / "state"
    atomic_write(path, b"old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_and_folder_are_forced_to_disk_around_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    path = tmp_path / "state"

    def fsync(descriptor: int) -> None:
        is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        seen.append((is_folder, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(path, b"new")
    assert seen == [(False, False), (True, True)]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "state"
    with pytest.raises(FileNotFoundError, match=str(path)):
        atomic_write(path, b"")


def test_who_writes_behind_goes_on_at_once_until_it_is_too_far_ahead() -> None:
    disk, threads, asked = Event(), set[int](), list[int]()

    def write() -> None:
        disk.wait()
        threads.add(get_ident())

    with writing_behind() as writer:

        def ask() -> None:
            for number in range(100):
                writer.write(write)
                asked.append(number)

        asking = Thread(target=ask)
        asking.start()
        asking.join(0.2)
        waited = len(asked)
        disk.set()
        asking.join()
        writer.finish()
    assert 0 < waited < 100
    assert len(asked) == 100
    assert threads
    assert get_ident() not in threads


def test_an_error_behind_ends_what_goes_on_and_what_has_not_begun_is_left_out(
    tmp_path: Path,
) -> None:
    written = list[int]()

    def ask_until_told() -> None:
        with writing_behind() as writer:
            writer.write(partial(atomic_write, tmp_path / "nowhere" / "state", b""))
            for number in range(1000):
                writer.write(partial(written.append, number))

    with pytest.raises(FileNotFoundError, match="nowhere/state"):
        ask_until_told()
    assert len(written) < 1000


@pytest.mark.parametrize("who", ["reads", "drops", "commits"])
def test_whoever_needs_what_is_being_written_waits_for_it(tmp_path: Path, who: str) -> None:
    slow = Event()
    with writing_behind() as writer:
        folder = RunFolder(tmp_path, writer)
        states = folder.states("own", 0)
        for _ in range(10):
            writer.write(partial(slow.wait, 0.2))  # a slow disk: what is put now comes later
        states.put("clients/a", Moments(steps=7))
        assert not (tmp_path / "clients").exists()
        match who:
            case "reads":
                assert folder.states("own", 1).get("clients/a", Moments) == Moments(steps=7)
            case "drops":
                states.drop("clients/a")
                writer.finish()
                assert folder.states("own", 1).get("clients/a", Moments) is None
            case "commits":
                folder.commit(Progress(1))
                assert FileStates(tmp_path, 1).get("clients/a", Moments) == Moments(steps=7)
