"""accepted.json of a client's folder: the round that counts, and its states by their digests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

from fedalt.core.digests import Digests
from fedalt.core.files import atomic_write
from fedalt.core.reading import StoreError, read_sealed, sealed
from fedalt.federation.messages import NEVER
from fedalt.runs.checkpoints import FileStates, Kept

ACCEPTED: Final = "accepted.json"


@dataclass
class Accepted:
    """The last round of which the server said that it counts, and which states there are.

    States of later rounds may count, too: the server has not said yet.
    """

    folder: Path
    round: int
    kept: Kept

    def write(self, round_: int) -> None:
        """Put it on disk, with what was noted of states since the last time."""
        digests = self.kept.digests
        states = {
            file.relative_to(self.folder).as_posix(): digest for file, digest in digests.files()
        }
        atomic_write(self.folder / ACCEPTED, sealed({"accepted": round_, "states": states}))
        self.round = round_


class _Form(TypedDict):
    accepted: int
    states: dict[str, str]


def read_accepted(folder: Path) -> Accepted:
    """What a client's folder says of itself. Raises StoreError where that is gone or damaged."""
    file = folder / ACCEPTED
    digests = Digests(folder, file)
    # Processes do not share a client: nothing counts but what this one has noted.
    kept = Kept(digests, rounds=_NO_ROUND)
    if not file.exists():
        for each in ("clients", "local", "moments"):
            if (folder / each).exists():
                raise StoreError(
                    f"{file} is missing, but {folder / each} is there; put the file back from a "
                    "backup"
                )
        return Accepted(folder, NEVER, kept)
    raw = read_sealed(file, _Form)
    for name, digest in raw["states"].items():
        digests.note(folder / name, digest)
    return Accepted(folder, raw["accepted"], kept)


_NO_ROUND: Final = 2**31  # after every round there is


def member_states(folder: Path, column: str, round_: int) -> FileStates:
    """A client's states as its owner reads them. Raises StoreError where they are damaged."""
    place = folder / "local" if column == "local" else folder
    return FileStates(place, round_, kept=read_accepted(folder).kept)
