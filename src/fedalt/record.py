"""What a run's folder tells of the run, read without a lock and without changing anything.

So it can be read while another process writes, on another machine too, and without PyTorch.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = 1


class StoreError(ValueError):
    """A run's folder that cannot be used, and why."""


@dataclass(frozen=True)
class Standing:
    """What progress.json says: what counts of a run.

    `best` holds for each arm's column the best round so far and its mean validation loss; of
    rounds.jsonl the first `record_bytes` bytes count.
    """

    rounds_done: int = 0
    best: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    tested: bool = False
    record_bytes: int = 0


@dataclass(frozen=True)
class Length:
    """How long a run is meant to be: its rounds, and whether a test follows the last one."""

    rounds: int
    test: bool


def require_run(path: Path) -> None:
    """Raise StoreError for a folder that is not a run's, or of another format."""
    file = path / "run.json"
    if not file.is_file():
        raise StoreError(f"{path} is not a run's folder: it has no run.json{meant_by(path)}")
    if is_client(path):
        raise StoreError(
            f"{path} is the state of a federation's client, which has no record of the rounds: "
            "that is with the server; of this client's own model, `fedalt evaluate`, `generate`, "
            "`chat` and `export` take the client.toml"
        )
    try:
        found = json.loads(file.read_text()).get("format")
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{file} is not a run's description: {error}") from error
    if found != FORMAT:
        raise StoreError(f"{path} has run format {found!r}, but this version reads {FORMAT}")


def require_clients(path: Path) -> None:
    """Raise StoreError for the folder of a federation's server: clients' data lie elsewhere."""
    if is_federation(read_facts(path)):
        raise StoreError(
            f"{path} is the folder of a federation's server, and clients' data and models lie "
            "with the clients: each owner's `fedalt evaluate`, `generate`, `chat` and `export` "
            "take the client's own client.toml; `fedalt server` goes on with the rounds"
        )


def is_federation(facts: Mapping[str, Any]) -> bool:
    """Whether these are the facts of a federation's server, which sees neither texts nor mixers."""
    return "terms" in facts


def is_client(path: Path) -> bool:
    """Whether a folder is the state of a federation's client: a model, and no record of rounds."""
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and facts.keys() >= {"federation", "client"}


def meant_by(path: Path) -> str:
    """What of a federation may be meant by a folder that is no run's."""
    if path.name == "client.toml" or (path / "client.toml").is_file():
        return (
            "; it is a federation's client, of which `fedalt evaluate`, `generate`, `chat` and "
            "`export` show the model; the rounds are on record at the server"
        )
    for inside in ("state/run", "run"):
        if (path / inside / "run.json").is_file():
            return f"; did you mean {path / inside}?"
    return ""


def read_facts(path: Path) -> dict[str, Any]:
    """What run.json holds."""
    facts: dict[str, Any] = json.loads((path / "run.json").read_text())
    return facts


def read_standing(path: Path) -> Standing:
    """How far a run is. Raises StoreError where progress.json is damaged."""
    file = path / "progress.json"
    if not file.exists():
        return Standing()
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    known = [each.name for each in fields(Standing)]
    if not isinstance(raw, dict) or raw.keys() != set(known):
        raise StoreError(f"{file} is damaged: expected {', '.join(known)}")
    best = {column: (int(at), float(loss)) for column, (at, loss) in raw["best"].items()}
    return Standing(raw["rounds_done"], best, raw["tested"], raw["record_bytes"])


def read_length(path: Path) -> Length:
    """What settings.toml says of a run's length. Raises StoreError where it says nothing."""
    file = path / "settings.toml"
    try:
        rounds = tomllib.loads(file.read_text())["rounds"]
        return Length(int(rounds["rounds"]), bool(rounds["test"]))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} does not tell rounds and test of [rounds]: {error}") from error
