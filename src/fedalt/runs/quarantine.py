"""Uploads that were refused: a line for each in refused.jsonl, their bytes beside it.

Refusals are few and outlive a crash: each is on disk before the round goes on, and one that a
repeated round comes to again is noted once.
"""

import hashlib
import json
import re
from itertools import chain, count
from pathlib import Path
from typing import Any, TypedDict

from fedalt.core.files import atomic_write, make_private_folder
from fedalt.core.reading import read_bytes, read_lines

RECORD = "refused.jsonl"
FOLDER = "quarantine"


class _Line(TypedDict):
    round: int
    client: str
    reason: str
    bytes: int
    file: str | None


_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def quarantine(
    folder: Path, round_: int, client_id: str, *, reason: str, data: bytes, limit: int
) -> None:
    """Note a refused upload in a run's folder.

    Its bytes are kept unless all that are kept would then be more than `limit` bytes.
    """
    lines: list[dict[str, Any]] = refusals(folder)
    file = _free(folder / FOLDER, f"{round_:04d}-{_file_name(client_id)}", data)
    kept = sum(other.stat().st_size for other in file.parent.glob("*") if other != file)
    keep = bool(data) and kept + len(data) <= limit
    line = {
        "round": round_,
        "client": client_id,
        "reason": reason,
        "bytes": len(data),
        "file": file.relative_to(folder).as_posix() if keep else None,
    }
    if keep:
        make_private_folder(file.parent)
        atomic_write(file, data)
    if line not in lines:
        text = "".join(json.dumps(noted) + "\n" for noted in [*lines, line])
        atomic_write(folder / RECORD, text.encode())


def refusals(folder: Path) -> list[dict[str, Any]]:
    """What refused.jsonl of a run says, oldest first: round, client, reason, bytes and file.

    `file` is relative to the run's folder, None where the bytes were not kept. Raises StoreError
    where refused.jsonl is damaged.
    """
    record = folder / RECORD
    return read_lines(record, _Line) if record.exists() else []


def _free(folder: Path, stem: str, data: bytes) -> Path:
    """A file that is not there, or that has this content already."""
    ending = _ending(data)
    later = (folder / f"{stem}-{number}{ending}" for number in count(2))
    files = chain([folder / f"{stem}{ending}"], later)
    return next(file for file in files if not file.exists() or read_bytes(file) == data)


def _file_name(client_id: str) -> str:
    """The client's id where it is a plain name; else its digest, as nothing else is safe."""
    if _PLAIN.fullmatch(client_id):
        return client_id
    return hashlib.sha256(client_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _ending(data: bytes) -> str:
    """Bytes that can be read are a safetensors file."""
    from fedalt.core.container import CodecError, unpack  # PyTorch, which readers need not load

    try:
        unpack(data)
    except CodecError:
        return ".bin"
    return ".safetensors"
