"""The states of a run's arm as files, one for each round, that no crash leaves in pieces.

A state is read as the newest file up to a round and written as the file of the next one, so that
what a crashed round has left behind is never read, only overwritten.
"""

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from fedalt.core.codec import fields_of, read, write
from fedalt.core.files import AtOnce, Writer, make_private_folder
from fedalt.core.reading import read_bytes
from fedalt.methods.contract import Ledger, Message
from fedalt.runs.kept import AREAS, Kept, file_of, rounds_in
from fedalt.runs.quarantine import quarantine
from fedalt.runs.record import StoreError

T = TypeVar("T")


@dataclass(frozen=True)
class FileStates:
    """An arm's states on disk: read as after round `round` - 1, written for `round`.

    What the `writer` has not finished yet is of this round, which is never read here. `kept` says
    which files count; without it those do that are there.
    """

    folder: Path
    round: int
    writer: Writer = field(default_factory=AtOnce)
    kept: Kept | None = None

    def get(self, key: str, cls: type[T]) -> T | None:
        """The newest value of a key that is older than this round.

        Raises StoreError where its file is gone or not the one that counts, and CodecError.
        """
        path = newest(self.folder / key, self.round - 1, self.kept)
        if path is None:
            return None
        ledgers = fields_of(cls, Ledger)
        given = {name: self._ledger(key, name) for name in ledgers}
        return read(cls, path, given=given, of=_reader(self.kept))

    def put(self, key: str, value: object) -> None:
        """Write a value beside its older ones; a ledger's entries are in files already."""
        path = self.folder / key / file_of(self.round)
        ledgers = fields_of(type(value), Ledger)
        self.writer.write(partial(_write, path, value, self.kept, omit=ledgers))
        for name in ledgers:
            self._adopt(self._ledger(key, name), getattr(value, name))

    def begin(self) -> None:
        """Forget what an attempt at this round that was cut short has left: it never counted."""
        for area in AREAS:
            self.drop(area)

    def drop(self, key: str) -> None:
        """Forget what was written for this round under a key and below it."""
        self.writer.finish()  # a write that came later would count
        for path in sorted((self.folder / key).rglob(file_of(self.round))):
            if path.is_file():
                path.unlink()
                if self.kept is not None:
                    self.kept.digests.forget(path)

    @contextmanager
    def spooling(self) -> Iterator[Path]:
        """An empty folder for the uploads of this round, which is gone afterwards."""
        folder = self.folder / "waiting"
        shutil.rmtree(folder, ignore_errors=True)
        make_private_folder(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def quarantine(self, client_id: str, reason: str, data: bytes, limit: int) -> None:
        """Note a rejected upload of this round beside the record, and keep it if it fits."""
        make_private_folder(self.folder)
        quarantine(self.folder, self.round, client_id, reason=reason, data=data, limit=limit)

    def backed(self, key: str, value: T) -> T:
        """The same value with ledgers that keep their entries in files from the first on."""
        names = fields_of(type(value), Ledger)
        return replace(value, **{name: self._ledger(key, name) for name in names})  # type: ignore[type-var]

    def _ledger(self, key: str, name: str) -> "FileLedger":
        return FileLedger(self.folder / key / name, self.round, self.writer, kept=self.kept)

    def _adopt(self, ours: "FileLedger", given: Ledger) -> None:
        """Put the entries of a ledger in memory, as a method starts with, into files.

        Those of clients that have left count no more once the round is committed.
        """
        if isinstance(given, dict):
            for client_id, message in given.items():
                ours.put(client_id, message)
        elif isinstance(given, FileLedger) and self.kept is not None:
            for client_id in given.left:
                self.kept.digests.forget_below(ours.folder / client_id)


@dataclass(frozen=True)
class FileLedger:
    """The latest upload of every client, a folder of files each.

    Of this round it has those alone that were put into it, the `fresh` ones: what else lies there
    is what an attempt that was cut short has left.
    """

    folder: Path
    round: int
    writer: Writer = field(default_factory=AtOnce)
    left: frozenset[str] = frozenset()
    kept: Kept | None = None
    fresh: frozenset[str] = frozenset()

    def __contains__(self, client_id: object) -> bool:
        """Whether this client has uploaded."""
        if client_id in self.left:
            return False
        before = newest(self._place(str(client_id)), self.round - 1, self.kept)
        return client_id in self.fresh or before is not None

    def __getitem__(self, client_id: str) -> Message:
        """The client's newest upload."""
        if client_id in self.fresh:
            self.writer.finish()
        at = self.round if client_id in self.fresh else self.round - 1
        path = newest(self._place(client_id), at, self.kept)
        if path is None or client_id in self.left:
            raise KeyError(client_id)
        return read(Message, path, of=_reader(self.kept))

    def clients(self) -> list[str]:
        """Every client that has uploaded, sorted."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        there |= self.fresh
        if self.kept is not None:
            there |= self.kept.digests.folders(self.folder)
        return sorted(name for name in there if name in self)

    def without(self, client_id: str) -> "FileLedger":
        """The same folder, but for this client; its files stay."""
        return replace(self, left=self.left | {client_id})

    def put(self, client_id: str, message: Message) -> "FileLedger":
        """Write this round's upload; it counts once the round is committed."""
        path = self._place(client_id) / file_of(self.round)
        self.writer.write(partial(_write, path, message, self.kept))
        return replace(self, fresh=self.fresh | {client_id}, left=self.left - {client_id})

    def _place(self, client_id: str) -> Path:
        """The client's folder; an id that leads elsewhere is refused."""
        if client_id in ("", "..") or client_id != Path(client_id).name:
            raise StoreError(f"client {client_id!r}: such an id cannot name a folder")
        return self.folder / client_id


def newest(folder: Path, round_: int, kept: Kept | None = None) -> Path | None:
    """The newest file of a state up to a round, of those that count."""
    if kept is not None:
        return kept.newest(folder, round_)
    if not folder.is_dir():
        return None
    rounds = rounds_in(file.name for file in folder.iterdir())
    upto = [number for number in rounds if number <= round_]
    return folder / file_of(max(upto)) if upto else None


def _write(path: Path, value: object, kept: Kept | None, omit: Collection[str] = ()) -> None:
    make_private_folder(path.parent)
    digest = write(path, value, omit=omit)
    if kept is not None:
        kept.digests.note(path, digest)


def _reader(kept: Kept | None) -> Callable[[Path], bytes]:
    return read_bytes if kept is None else kept.digests.read
