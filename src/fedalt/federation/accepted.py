"""accepted.json of a client's folder: the round that counts, and its states by their digests.

Where a server was restored from a backup, a client that is ahead of it goes back to its round. Only
its owner can tell that from a server that lies, so a client goes back when it is told to. It keeps
the states of its last accepted rounds for that. Nothing is lost: the states that the server has
forgotten lie in set-aside/, with the folders that they lay in.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NotRequired, TypedDict

from fedalt.core.digests import Digests
from fedalt.core.files import atomic_write, make_private_folder
from fedalt.core.reading import StoreError, read_json, read_sealed, sealed
from fedalt.federation.agreement import Agreement
from fedalt.federation.call_checks import CallRefused
from fedalt.federation.messages import NEVER
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.kept import Kept, rounds_in

ACCEPTED: Final = "accepted.json"
FORMAT: Final = 3  # of a client's folder
KEPT: Final = 3  # accepted rounds whose states are kept: the last one, and two before it
SET_ASIDE: Final = "set-aside"


@dataclass
class Accepted:
    """The last round of which the server said that it counts, and which states there are.

    States of later rounds may count, too: the server has not said yet. `may_go_back`: the owner
    lets the next call take that back. `begun` is how many rounds the client's own ledger of privacy
    has counted: never again fewer.
    """

    folder: Path
    round: int
    kept: Kept
    may_go_back: bool = False
    begun: int = 0

    def write(self, round_: int) -> None:
        """Put it on disk, with what was noted of states since the last time."""
        digests = self.kept.digests
        states = {
            file.relative_to(self.folder).as_posix(): digest for file, digest in digests.files()
        }
        begun = {"begun": self.begun} if self.begun else {}
        content = {"accepted": round_, **begun, "states": states}
        atomic_write(self.folder / ACCEPTED, sealed(content))
        self.round = round_

    def last_rounds(self, client_id: str, round_: int) -> list[int]:
        """The last rounds up to this one after which there are states, the newest last."""
        there = self._rounds_of(client_id)
        return [*[known for known in there if known < round_][1 - KEPT :], round_]

    def go_back(self, client_id: str, round_: int) -> str:
        """Let a round be the last that counts; what to tell the owner.

        Raises CallRefused without its state. Interrupted, it can be repeated.
        """
        there, before = self._rounds_of(client_id), self.round
        if round_ != NEVER and round_ not in there:
            states = ", ".join(str(at + 1) for at in there) or "no round"
            raise CallRefused(
                f"client {client_id!r}: the server goes back to round {round_ + 1}, but this "
                f"client has the states of {states}; nothing was changed. Restore its folder from "
                "a backup of that time, or let the server's operator restore a newer one or take "
                "the client out"
            )
        digests, aside = self.kept.digests, self.folder / SET_ASIDE
        newer = [file for file, _ in digests.files() if int(file.stem) > round_]
        for file in newer:
            copy = aside / file.relative_to(self.folder)
            make_private_folder(copy.parent)
            shutil.copy(file, copy)
            digests.forget(file)
        self.write(round_)
        for file in newer:
            file.unlink(missing_ok=True)
        return (
            f"the server was set back; this client goes back from round {before + 1} to "
            f"{round_ + 1 or 'its start'} with it, and its newer states are in {aside}"
        )

    def _rounds_of(self, client_id: str) -> list[int]:
        folder = self.folder / "clients" / client_id
        return sorted(rounds_in(self.kept.digests.names(folder)))


class _Form(TypedDict):
    accepted: int
    begun: NotRequired[int]
    states: dict[str, str]


def read_accepted(folder: Path) -> Accepted:
    """What a client's folder says of itself. Raises StoreError where that is gone or damaged."""
    file = folder / ACCEPTED
    digests = Digests(folder, file)
    # Processes do not share a client: nothing counts but what this one has noted.
    kept = Kept(digests, rounds=_NO_ROUND)
    if not file.exists():
        for area in ("clients", "local", "moments"):
            if (folder / area).exists():
                raise StoreError(
                    f"{file} is missing, but {folder / area} is there; put the file back from a "
                    "backup"
                )
        return Accepted(folder, NEVER, kept)
    raw = read_sealed(file, _Form)
    for name, digest in raw["states"].items():
        digests.note(folder / name, digest)
    return Accepted(folder, raw["accepted"], kept, begun=raw.get("begun", 0))


_NO_ROUND: Final = 2**31  # after every round there is


def client_states_of(folder: Path, column: str, round_: int) -> FileStates:
    """A client's states as its owner reads them. Raises StoreError where they are damaged."""
    return FileStates(folder_of(folder, column), round_, kept=read_accepted(folder).kept)


def folder_of(folder: Path, column: str) -> Path:
    """Where a column's states lie: the baseline's in a folder of their own, as a run's do."""
    return folder / "local" if column == "local" else folder


class _About(TypedDict):
    format: int


def claim(folder: Path, agreement: Agreement, client_id: str) -> Accepted:
    """A folder belongs to one client of one federation for ever; what it says of its states."""
    about = {
        "format": FORMAT,
        "federation": agreement.name,
        "client": client_id,
        "terms": agreement.digest,
    }
    file = folder / "run.json"
    if not file.exists():
        for name in (ACCEPTED, "clients", "answer.bin"):
            if (folder / name).exists():
                raise StoreError(f"{file} is missing, but {folder / name} is there")
        atomic_write(file, (json.dumps(about, indent=2) + "\n").encode())
    written = read_json(file, _About)
    if written["format"] != FORMAT:
        raise StoreError(
            f"{file}: a client's folder of format {written['format']}, but this version reads "
            f"{FORMAT}; the version that began the federation goes on with it"
        )
    if written != about:
        key = next((key for key in about if written.get(key) != about[key]), min(written))
        raise StoreError(
            f"{file}: the folder belongs to {key} {written.get(key)!r}, but terms.toml and "
            f"client.toml are those of {about.get(key)!r}; use another folder for it"
        )
    kept = folder / "answer.bin"
    if kept.exists() and not kept.is_file():
        raise StoreError(f"{kept} cannot be read: it is no file")
    accepted = read_accepted(folder)
    accepted.kept.digests.require_there()
    return accepted
