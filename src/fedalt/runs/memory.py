"""What a process knows of a run's folder, so that it reads nothing twice."""

import os
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedalt.core.files import open_private
from fedalt.core.reading import StoreError
from fedalt.runs.kept import Kept
from fedalt.runs.standing import RECORD, Standing, read_digests, read_standing, write_standing


@dataclass
class Memory:
    """How a run stands and what it keeps; `hashed` is of the first `bytes` of its record."""

    path: Path
    standing: Standing
    kept: Kept
    hashed: Any = field(default_factory=sha256)
    bytes: int = 0

    @classmethod
    def of(cls, path: Path) -> "Memory":
        """Read it from the folder, whose run may go on meanwhile. Raises StoreError."""
        while True:
            standing = read_standing(path)
            try:
                return cls(path, standing, Kept(read_digests(path, standing), standing.rounds_done))
            except StoreError:
                if standing == read_standing(path):
                    raise
                # Another process has committed since: the list of digests was the next one's.

    def write(self, standing: Standing) -> None:
        """Make a standing count."""
        self.standing = write_standing(self.path, standing, self.kept.digests)
        self.kept = replace(self.kept, rounds=standing.rounds_done)

    def hash_record(self) -> int:
        """Force the record to disk, and its new lines into the digest; how long it is."""
        if self.bytes != self.standing.record_bytes:  # a commit failed half way
            self.hashed, self.bytes = sha256(), 0
        with open_private(self.path / RECORD, "a+b") as file:
            os.fsync(file.fileno())
            file.seek(self.bytes)
            while data := file.read(2**20):
                self.hashed.update(data)
                self.bytes += len(data)
        return self.bytes
