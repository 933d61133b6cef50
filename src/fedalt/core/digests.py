"""Which files of a folder count, and the SHA-256 of each: a file that is gone or another shows.

On disk that is a list as `sha256sum` writes and checks it: `sha256sum --check states-0.sha256`.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

from fedalt.core.reading import StoreError, read_bytes

_LINE: Final = re.compile(rb"(\\?)([0-9a-f]{64})  (.+)", re.DOTALL)


@dataclass
class Digests:
    """The files below `root` that count, and those written since, which may count later.

    Keys are a file's folder and its name, both below `root`. `says` is the file that names them:
    errors quote it. Threads may add while another one reads.
    """

    root: Path
    says: Path
    _of: dict[str, dict[str, str]] = field(default_factory=dict)

    def note(self, file: Path, digest: str) -> None:
        """Remember a file's digest in place of the one that it had."""
        self._of.setdefault(self._key(file.parent), {})[file.name] = digest

    def forget(self, file: Path) -> None:
        """The file counts no more."""
        self._of.get(self._key(file.parent), {}).pop(file.name, None)

    def forget_below(self, folder: Path) -> None:
        """No file in this folder and in folders below it counts any more."""
        key = self._key(folder)
        for folder_key in list(self._of):
            if f"{folder_key}/".startswith(f"{key}/"):
                del self._of[folder_key]

    def names(self, folder: Path) -> list[str]:
        """The names of this folder's own files."""
        return list(self._of.get(self._key(folder), ()))

    def folders(self, folder: Path) -> set[str]:
        """The names of folders right below this one in which there are files."""
        begin = f"{self._key(folder)}/"
        below = [key for key, of in list(self._of.items()) if of and key.startswith(begin)]
        return {key.removeprefix(begin).split("/", 1)[0] for key in below}

    def files(self) -> Iterator[tuple[Path, str]]:
        """All files, sorted, with their digests."""
        for key in sorted(self._of):
            for name, digest in sorted(self._of[key].items()):
                yield self.root / key / name, digest

    def require(self, file: Path, data: bytes) -> None:
        """Raise StoreError unless a file that counts has this content."""
        expected = self._of.get(self._key(file.parent), {}).get(file.name)
        if expected is not None and digest_of(data) != expected:
            raise StoreError(
                f"{file} was changed after it was written: its content is not what {self.says} "
                "says; put the file back from a backup"
            )

    def read(self, file: Path) -> bytes:
        """A file's content, if it is there and, where it counts, what it has to be. StoreError."""
        if not file.exists():
            raise self.missing(file)
        data = read_bytes(file)
        self.require(file, data)
        return data

    def require_there(self) -> None:
        """Raise StoreError unless all files that count are there."""
        for file, _ in self.files():
            if not file.is_file():
                if file.exists():
                    raise StoreError(f"{file} is no file, but {self.says} counts on it")
                raise self.missing(file)

    def require_whole(self) -> None:
        """Raise StoreError unless all files that count are there with their content."""
        for file, _ in self.files():
            self.read(file)

    def missing(self, file: Path) -> StoreError:
        """What to say of a file that is gone."""
        return StoreError(
            f"{file} is missing, but {self.says} counts on it; put the file back from a backup"
        )

    def to_bytes(self) -> bytes:
        """The list as `sha256sum` writes it."""
        return b"".join(  # texts, as paths would take most of a commit's time
            _line(digest, os.fsencode(name if key == "." else f"{key}/{name}"))
            for key in sorted(self._of)
            for name, digest in sorted(self._of[key].items())
        )

    @staticmethod
    def of_bytes(data: bytes, root: Path, says: Path) -> "Digests":
        """What `to_bytes` made bytes of. Raises StoreError, which names `says`."""
        digests = Digests(root, says)
        for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else (), 1):
            match = _LINE.fullmatch(line)
            if match is None:
                raise StoreError(f"{says} is damaged: line {number} has no digest and name")
            escaped, digest, name = match.groups()
            if escaped:
                name = re.sub(rb"\\(.)", lambda one: b"\n" if one[1] == b"n" else one[1], name)
            key, _, last = os.fsdecode(name).rpartition("/")
            digests._of.setdefault(key or ".", {})[last] = digest.decode()
        return digests

    def _key(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()


def digest_of(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return sha256(data).hexdigest()


def _line(digest: str, name: bytes) -> bytes:
    """A name with a line break is written as sha256sum writes it."""
    if b"\n" in name or b"\\" in name:
        name = name.replace(b"\\", rb"\\").replace(b"\n", rb"\n")
        return b"\\" + digest.encode() + b"  " + name + b"\n"
    return digest.encode() + b"  " + name + b"\n"
