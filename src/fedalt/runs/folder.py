"""A run's folder: settings, the record of rounds, and states that no crash leaves in pieces.

run.json                    format, versions, data and model fingerprints
settings.toml               the resolved settings
rounds.jsonl                one line per client, evaluation and round
examples.jsonl              a few test examples of each client in full: private, like the data
progress.json               how far the run is; replacing this file commits a round
states-0.sha256             the digests of all files that count; states-1.sha256 in turn with it
clients/ID/0007.safetensors a client's state after round 7, and server/ likewise
server/latest/ID/...        each client's last upload, for methods that keep a ledger
local/...                   the same for the local-only baseline; see checkpoints.py
refused.jsonl, quarantine/  rejected uploads: why, and their bytes
waiting/                    uploads of a round that has to see all before it judges one
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NotRequired, TypedDict

from filelock import FileLock, Timeout

from fedalt.core.digests import Digests, digest_of
from fedalt.core.files import AtOnce, Writer, atomic_write, make_private_folder, open_private
from fedalt.core.reading import read_bytes, read_lines
from fedalt.runs.memory import Memory
from fedalt.runs.record import StoreError as StoreError
from fedalt.runs.record import everyone_in, require_committed, require_run
from fedalt.runs.standing import (
    FACTS,
    RECORD,
    facts_locked,
    read_facts,
    read_standing,
    seal_of_facts,
    write_facts,
)

if TYPE_CHECKING:  # whoever only reads a record does without torch
    from fedalt.engine.schedule import Line, Progress
    from fedalt.runs.checkpoints import FileStates

EXAMPLES: Final = "examples.jsonl"
_COLUMNS: Final = ("own", "local")


class _Example(TypedDict):
    client: str
    column: str
    round: int
    prompt: str
    reference: str
    prediction: str | None
    loss: float
    tokens: NotRequired[list[tuple[str, float]]]
    slots: NotRequired[list[str]]


@dataclass(frozen=True)
class RunFolder:
    """The journal of a run, on disk. Use it within `locked`."""

    path: Path
    writer: Writer = field(default_factory=AtOnce)
    _memory: list[Memory] = field(default_factory=list, repr=False, compare=False)

    def progress(self, leaving: str | None = None) -> "Progress":
        """How far the run is; the record is cut back to what was committed with that.

        Raises StoreError where anything that counts is gone. What states hold is looked at when
        they are read, or by `require_whole`. Only for the client who is `leaving` may its leaving
        have been cut short.
        """
        begun = self.facts().get("leaving")
        if begun not in (None, leaving):
            raise StoreError(
                f"`fedalt leave {self.path} --client {begun}` was cut short and left files of two "
                "kinds; the same command again ends what it began"
            )
        memory = self._remembered()
        if begun is not None:
            self._take_as_it_is(memory.kept.digests, begun)
        now, record = memory.standing, self.path / RECORD
        self._committed()
        memory.kept.digests.require_there()
        if record.exists() and record.stat().st_size > now.record_bytes:
            os.truncate(record, now.record_bytes)
        from fedalt.engine.schedule import Progress

        return Progress(now.rounds_done, now.best, now.tested)

    def require_whole(self) -> None:
        """Raise StoreError unless every file that counts has the content that was committed."""
        self._remembered().kept.digests.require_whole()

    def states(self, column: str, round_: int) -> "FileStates":
        """The local-only baseline has a folder of its own; the method lies at the top."""
        from fedalt.runs.checkpoints import FileStates

        self.writer.finish()  # it may be what is read now
        return FileStates(self._arm(column), round_, self.writer, self._remembered().kept)

    def record(self, line: "Line") -> None:
        """Append a line to rounds.jsonl."""
        with open_private(self.path / RECORD, "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def keep_examples(self, lines: "Sequence[Line]") -> None:
        """Replace examples.jsonl."""
        compact = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        whole = "".join(f"{compact.encode(line)}\n" for line in lines).encode()
        atomic_write(self.path / EXAMPLES, whole)
        self._remembered().kept.digests.note(self.path / EXAMPLES, digest_of(whole))

    def commit(self, progress: "Progress") -> None:
        """Make the round count by replacing progress.json, then drop states no one needs."""
        self.writer.finish()
        memory = self._remembered()
        stale = [
            file
            for column in _COLUMNS
            for file in memory.kept.settle(self._arm(column), kept_rounds(progress, column))
        ]
        if not progress.tested:  # those of an earlier end may be replaced at any time from now on
            memory.kept.digests.forget(self.path / EXAMPLES)
        size = memory.hash_record()
        facts = (seal_of_facts(self.facts()),) if (self.path / FACTS).exists() else ()
        memory.write(
            replace(
                memory.standing,
                rounds_done=progress.rounds_done,
                best=progress.best,
                tested=progress.tested,
                record_bytes=size,
                record_sha256=memory.hashed.hexdigest(),
                facts=facts,
            )
        )
        for file in stale:
            file.unlink(missing_ok=True)

    def lines(self) -> list[dict[str, Any]]:
        """Everything committed to rounds.jsonl. Raises StoreError where it was changed."""
        return [json.loads(line) for line in self._committed().splitlines()]

    def examples(self) -> list[dict[str, Any]]:
        """What examples.jsonl holds. Raises StoreError where it is gone, or changed."""
        file, digests = self.path / EXAMPLES, self._remembered().kept.digests
        if EXAMPLES in digests.names(self.path):
            digests.read(file)
        return read_lines(file, _Example) if file.exists() else []

    def rounds_done(self) -> int:
        """How many rounds are committed; unlike `progress` safe while another process writes."""
        return read_standing(self.path).rounds_done

    def facts(self) -> dict[str, Any]:
        """What run.json holds. Raises StoreError where it was changed."""
        return read_facts(self.path)

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """Add to what run.json holds, or replace a part of it; None takes it out."""
        self.change_facts(lambda _: facts)

    def change_facts(self, change: Callable[[dict[str, Any]], Mapping[str, object]]) -> None:
        """Add to what run.json holds what `change` makes of that; nobody writes it meanwhile.

        What was written of states since the last commit counts from now on, too.
        """
        with facts_locked(self.path):
            before = self.facts()
            if changes := change(before):
                self._replace_facts(before, {**before, **changes})

    def _replace_facts(self, before: Mapping[str, object], now: Mapping[str, object]) -> None:
        after = {key: value for key, value in now.items() if value is not None}
        seals = tuple(dict.fromkeys(seal_of_facts(state) for state in (before, after)))
        if len(seals) == 1 or not read_standing(self.path).facts:
            write_facts(self.path, after)
            return
        # Whenever this is cut short, the file is one of the two.
        memory = self._remembered()
        memory.write(replace(memory.standing, facts=seals))
        write_facts(self.path, after)
        memory.write(replace(memory.standing, facts=seals[1:]))

    def set_best(self, best: "Mapping[str, tuple[int, float]]") -> None:
        """Give the best rounds other losses; what was written of states counts from now on, too."""
        memory = self._remembered()
        memory.write(replace(memory.standing, best=best))

    def left(self) -> frozenset[str]:
        """The clients that have left the run."""
        return frozenset(self.facts().get("left", ()))

    def staying(self) -> dict[str, Any]:
        """What is known of each client whose model can be had: who has not left, with who joined.

        Raises StoreError where nobody is there any more.
        """
        about, left = everyone_in(self.facts()), self.left()
        if not (staying := {client: of for client, of in about.items() if client not in left}):
            raise StoreError(f"{self.path}: all of its clients have left, so no model can be had")
        return staying

    def forget_uploads(self, client_id: str) -> None:
        """Drop what ledgers of the server hold of a client."""
        for ledger in (self.path / "server").glob("*/"):
            shutil.rmtree(ledger / client_id, ignore_errors=True)
            self._remembered().kept.digests.forget_below(ledger / client_id)

    def _take_as_it_is(self, digests: Digests, client_id: str) -> None:
        """Let count what a leaving that was cut short has left of the server's states."""
        self.forget_uploads(client_id)
        for name in digests.names(self.path / "server"):
            file = self.path / "server" / name
            digests.note(file, digest_of(read_bytes(file)))

    def _arm(self, column: str) -> Path:
        return self.path / "local" if column == "local" else self.path

    def _remembered(self) -> Memory:
        """What is known of the folder, read anew if another process has committed since."""
        if not self._memory or self._memory[0].standing != read_standing(self.path):
            self._memory[:] = [Memory.of(self.path)]
        return self._memory[0]

    def _committed(self) -> bytes:
        """The part of rounds.jsonl that counts. Raises StoreError where it is not as written."""
        now, record = read_standing(self.path), self.path / RECORD
        if not record.exists() and not now.record_bytes:
            return b""
        whole = read_bytes(record)[: now.record_bytes]
        require_committed(record, whole, now)
        return whole


def kept_rounds(progress: "Progress", column: str) -> list[int]:
    """The rounds after which an arm's states are kept: the last two and the best one."""
    best = [progress.best[column][0]] if column in progress.best else []
    last = range(max(0, progress.rounds_done - 2), progress.rounds_done)
    return sorted({*last, *best})


def open_run(path: Path) -> RunFolder:
    """An existing run's folder, if it is one and of this format."""
    require_run(path)
    return RunFolder(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process out of a run's folder; a dead process holds no lock."""
    make_private_folder(path)
    # A soft lock, in place of one that a file system does not know, would outlive its process.
    lock = FileLock(path / ".lock", 0, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(f"another process is using {path}") from None
    try:
        yield
    finally:
        lock.release()
