"""What a run's folder tells of the run, read without a lock and without changing anything.

So it can be read while another process writes, on another machine too, and without PyTorch.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict, cast

from fedalt.core.digests import digest_of
from fedalt.core.reading import FormError, parse, read_json, read_text, require
from fedalt.core.reading import StoreError as StoreError
from fedalt.runs.standing import PROGRESS
from fedalt.runs.standing import Standing as Standing
from fedalt.runs.standing import read_facts as read_facts
from fedalt.runs.standing import read_standing as read_standing

FORMAT: Final = 3


@dataclass(frozen=True)
class Length:
    """How long a run is meant to be: its rounds, and whether a test follows the last one."""

    rounds: int
    test: bool


class _Metrics(TypedDict):
    loss: float


class _Train(TypedDict):
    round: int
    client: str
    column: str
    metrics: _Metrics
    upload_bytes: int
    download_bytes: NotRequired[int]
    seconds: NotRequired[float]
    refused: NotRequired[str]


class _Score(TypedDict):
    split: Literal["validation", "test"]
    round: int
    client: str
    column: str
    metrics: _Metrics


class _Mixer(TypedDict):
    split: Literal["validation", "test"]
    round: int
    client: str
    column: str
    slots: list[str]
    weights: dict[str, list[float]]
    histogram: list[int]


class _Round(TypedDict):
    round: int
    cohort: int
    seconds: float
    peak_memory_bytes: int
    epsilon: NotRequired[float | None]
    delta: NotRequired[float]
    noise: NotRequired[float]
    download_error: NotRequired[float]


class Similarity(TypedDict):
    """How far apart clients' own adapters are: 1 - cosine, mean over sites, after a round.

    `distances` are those of the pairs (0, 1), (0, 2), ..., (1, 2), ... of `clients`. `column` tells
    whose adapters they are, "own" or the baseline's "local"; `signal` what was compared, products
    B A or B alone; `groups` the group of each client, where the method makes groups.
    """

    column: str
    round: int
    signal: Literal["B", "BA"]
    clients: list[str]
    distances: list[float]
    groups: dict[str, int]


class Summary(TypedDict):
    """What a run computes once it has been tested: `similarity` may say why there is none.

    `round` is its last one, `effort` part of `cells.Cost`.
    """

    round: int
    effort: dict[str, Any]
    similarity: Similarity | str


class _Kind(TypedDict):
    kind: Literal["train", "score", "mixer", "round", "summary"]


_LINES: Final[dict[str, Any]] = {
    "train": _Train,
    "score": _Score,
    "mixer": _Mixer,
    "round": _Round,
    "summary": Summary,
}


class _Format(TypedDict):
    format: int


class _Rounds(TypedDict):
    rounds: int
    test: bool


class _Settings(TypedDict):
    rounds: _Rounds


def require_run(path: Path) -> None:
    """Raise StoreError for a folder that is not a run's, or of another format."""
    file = path / "run.json"
    if not file.exists():
        raise StoreError(f"{path} is not a run's folder: it has no run.json{meant_by(path)}")
    if is_client(path):
        raise StoreError(
            f"{path} is the state of a federation's client, which has no record of the rounds: "
            "that is with the server; of this client's own model, `fedalt evaluate`, `generate`, "
            "`chat` and `export` take the client.toml"
        )
    version = read_json(file, _Format)["format"]
    if version in range(1, FORMAT):
        raise StoreError(
            f"{file}: this run is of format {version}, and this version reads {FORMAT}; the "
            "version that began the run goes on with it, or begin a new run"
        )
    if version != FORMAT:
        raise StoreError(f"{file}: run format {version!r}, but this version reads {FORMAT}")


def require_clients(path: Path) -> None:
    """Raise StoreError for the folder of a federation's server: clients' data lie elsewhere."""
    if is_federation(read_facts(path)):
        raise StoreError(
            f"{path} is the folder of a federation's server, and clients' data and models lie "
            "with the clients: each owner's `fedalt evaluate`, `generate`, `chat` and `export` "
            "take the client's own client.toml; `fedalt server` goes on with the rounds"
        )


def everyone_in(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of each client that a run has had, those who joined after training too."""
    return {**facts.get("clients", {}), **facts.get("joined", {})}


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
    if (path / "settings.toml").is_file():
        return "; if it was killed before it had one, the command that began it begins it anew"
    return ""


def read_length(path: Path) -> Length:
    """What settings.toml says of a run's length. Raises StoreError where it says nothing."""
    file = path / "settings.toml"
    try:
        table = tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise StoreError(f"{file} is damaged: it is not TOML ({error})") from None
    try:
        require(table, _Settings)
    except FormError as error:
        raise StoreError(f"{file} does not tell rounds and test of [rounds]: {error}") from None
    return Length(table["rounds"]["rounds"], table["rounds"]["test"])


def parse_line(text: str) -> dict[str, Any]:
    """A line of rounds.jsonl. Raises FormError for what no run has written."""
    line: dict[str, Any] = parse(text, _Kind)
    require(line, _LINES[line["kind"]])
    return line


def summary_in(lines: Iterable[Mapping[str, Any]]) -> Summary | None:
    """The newest summary of a record; an older version's has none."""
    summaries = [line for line in lines if line["kind"] == "summary"]
    return cast(Summary, summaries[-1]) if summaries else None


def require_committed(record: Path, data: bytes, now: Standing) -> None:
    """Raise StoreError unless these are the bytes of rounds.jsonl that progress.json speaks of."""
    if len(data) < now.record_bytes:
        raise StoreError(
            f"{record} has {len(data)} bytes, but {record.parent / PROGRESS} counts "
            f"{now.record_bytes}: its end is missing; put the file back from a backup"
        )
    if digest_of(data) == now.record_sha256:
        return
    list(committed_lines(data, record))
    raise StoreError(
        f"{record} was changed after it was written: it is not what {record.parent / PROGRESS} "
        "says; put the file back from a backup"
    )


def committed_lines(
    data: bytes, record: Path, parsed: Callable[[str], dict[str, Any]] | None = None
) -> Iterator[dict[str, Any]]:
    """The whole lines of a part of rounds.jsonl, each checked unless `parsed` does without.

    Raises StoreError with the number of the line within the part.
    """
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            yield (parsed or parse_line)(line.decode())
        except (FormError, UnicodeDecodeError) as error:
            raise StoreError(f"{record} is damaged: line {number}: {error}") from None
