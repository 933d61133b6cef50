"""progress.json: how far a run is, and what of its folder counts. Replacing it commits a round.

It has a digest of itself, of run.json, of rounds.jsonl as far as that counts, and of the list of
all other files that count. There are two such lists, written in turn, so that the one that counts
is whole whenever a process is killed; from the first commit on both are there, which shows that a
progress.json that is missing was deleted.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NotRequired, TypedDict

from fedalt.core.digests import Digests, digest_of
from fedalt.core.files import atomic_write, one_at_a_time
from fedalt.core.reading import StoreError, read_bytes, read_json, read_sealed, seal_of, sealed

PROGRESS: Final = "progress.json"
FACTS: Final = "run.json"
RECORD: Final = "rounds.jsonl"
LISTS: Final = ("states-0.sha256", "states-1.sha256")
NOTHING: Final = digest_of(b"")


@dataclass(frozen=True)
class Standing:
    """What progress.json says: what counts of a run.

    `best` holds for each arm's column the best round so far and its validation loss; of
    rounds.jsonl the first `record_bytes` bytes count. `facts` are the digests that run.json may
    have: two while it is being replaced.
    """

    rounds_done: int = 0
    best: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    tested: bool = False
    record_bytes: int = 0
    record_sha256: str = NOTHING
    states: str = ""
    states_sha256: str = NOTHING
    facts: tuple[str, ...] = ()


class _Form(TypedDict):
    rounds_done: int
    best: dict[str, tuple[int, float]]
    tested: bool
    record_bytes: int
    record_sha256: str
    states: str
    states_sha256: str
    facts: list[str]


class Facts(TypedDict):
    """run.json: what a run is about, as far as anyone reads it."""

    format: int
    versions: dict[str, str]
    data: "_Data"
    model: "_Model"
    method: str
    clients: dict[str, dict[str, Any]]
    settings: NotRequired[dict[str, Any]]
    trainable_numbers: NotRequired[dict[str, int]]
    warnings: NotRequired[list[str]]
    terms: NotRequired[str]
    joined: NotRequired[dict[str, dict[str, Any]]]
    left: NotRequired[list[str]]
    leaving: NotRequired[str]
    revoked: NotRequired[list[str]]


class _Data(TypedDict):
    fingerprint: str
    labels: list[str]
    template: str


class _Model(TypedDict):
    name: str
    fingerprint: str


def read_standing(path: Path) -> Standing:
    """How far the run in a folder is. Raises StoreError where progress.json is damaged or gone."""
    file = path / PROGRESS
    lists = [path / name for name in LISTS]
    if not file.exists() and all(digests.exists() for digests in lists) and not file.exists():
        raise StoreError(
            f"{file} is missing, but rounds of this run were counted; put the file back from a "
            "backup, together with all of the folder"
        )
    if not file.exists():
        return Standing()
    raw = read_sealed(file, _Form)
    best = {column: (at, float(loss)) for column, (at, loss) in raw["best"].items()}
    if raw["states"] not in LISTS:
        raise StoreError(f"{file} is damaged: states: expected {' or '.join(LISTS)}")
    return Standing(**{**raw, "best": best, "facts": tuple(raw["facts"])})


def write_standing(path: Path, standing: Standing, kept: Digests) -> Standing:
    """Make a standing count, and with it all files whose digests are given; as it was written."""
    data = kept.to_bytes()
    other = LISTS[standing.states == LISTS[0]]
    atomic_write(path / other, data)
    now = Standing(**{**vars(standing), "states": other, "states_sha256": digest_of(data)})
    atomic_write(path / PROGRESS, sealed(asdict(now)))
    kept.says = path / other
    for name in LISTS:
        if not (path / name).exists():
            atomic_write(path / name, b"")
    return now


def read_digests(path: Path, standing: Standing) -> Digests:
    """The digests of the files that count. Raises StoreError."""
    if not standing.states:
        return Digests(path, path / PROGRESS)
    file = path / standing.states
    data = read_bytes(file)
    if digest_of(data) != standing.states_sha256:
        raise StoreError(
            f"{file} and {path / PROGRESS} do not belong together: one of them was changed, or is "
            "of an earlier time; put both back from the same backup"
        )
    return Digests.of_bytes(data, path, file)


def read_facts(path: Path) -> dict[str, Any]:
    """What run.json holds. Raises StoreError where it is not what the run has written."""
    for _ in range(2):  # both files may be replaced between the two looks, but not twice
        facts: dict[str, Any] = read_json(path / FACTS, Facts)
        allowed = read_standing(path).facts
        if not allowed or seal_of_facts(facts) in allowed:
            return facts
    raise StoreError(
        f"{path / FACTS} was changed after it was written: its content is not what "
        f"{path / PROGRESS} says; put the file back from a backup"
    )


def seal_of_facts(facts: Mapping[str, Any]) -> str:
    """The digest of what run.json holds, but for what the keys of a federation's clients decide.

    Who is revoked is noted there while the server runs; it follows from the keys.
    """
    revoked = facts.get("revoked", [])
    left = [client for client in facts.get("left", []) if client not in revoked]
    rest = {key: value for key, value in facts.items() if key not in ("revoked", "left")}
    return seal_of({**rest, "left": left})


@contextmanager
def facts_locked(path: Path) -> Iterator[None]:
    """Wait until nobody else is changing run.json, which is done beside a running server too."""
    with one_at_a_time(path / ".facts.lock"):
        yield


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Replace run.json."""
    atomic_write(path / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
