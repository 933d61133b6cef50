"""Which files of states in a run's folder count; whoever only asks that does without torch."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedalt.core.digests import Digests, digest_of
from fedalt.core.reading import read_bytes

AREAS: Final = ("clients", "server", "moments", "noise")
_STATE: Final = re.compile(r"([0-9]+)\.safetensors")


@dataclass(frozen=True)
class Kept:
    """The states in a folder that count, by digest, and after how many rounds they do.

    What was written since is of the round in progress, number `rounds`; processes that share a run
    write for each other, so such a file counts where it lies.
    """

    digests: Digests
    rounds: int

    def newest(self, folder: Path, round_: int) -> Path | None:
        """The newest file of a state up to a round; it may be gone, which shows when it is read."""
        rounds = rounds_in(self.digests.names(folder))
        if round_ >= self.rounds and (folder / file_of(round_)).exists():
            rounds.append(round_)
        upto = [number for number in rounds if number <= round_]
        return folder / file_of(max(upto)) if upto else None

    def settle(self, folder: Path, keep: Sequence[int], areas: Sequence[str] = AREAS) -> list[Path]:
        """Let only those files of these areas count that are the newest of any of these rounds.

        The others that are there are returned: they can be dropped once this is on disk.
        """
        stale = []
        for area in areas:
            for parent, _, files in os.walk(folder / area):
                where = Path(parent)
                there = set(rounds_in(files))
                known = set(rounds_in(self.digests.names(where)))
                for number in there - known:
                    if number >= self.rounds:  # another process of this run has written it
                        file = where / file_of(number)
                        self.digests.note(file, digest_of(read_bytes(file)))
                        known.add(number)
                needed = {max((r for r in known if r <= limit), default=None) for limit in keep}
                for number in known - needed:
                    self.digests.forget(where / file_of(number))
                stale += [where / file_of(number) for number in there - needed]
                # What a killed process was writing.
                stale += [where / name for name in files if name.endswith(".tmp")]
        return stale


def file_of(round_: int) -> str:
    """The name of a state after a round."""
    return f"{round_:04d}.safetensors"


def rounds_in(files: Iterable[str]) -> list[int]:
    """The rounds of which these files are states; other files are none."""
    return [int(match[1]) for name in files if (match := _STATE.fullmatch(name))]
