"""What server and clients of a federation say to each other, as bytes of the codec."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedalt.engine.changes import Sent

Split = Literal["validation", "test"]
NEVER = -1  # the round of something that has not happened


@dataclass(frozen=True)
class Call:
    """What the server asks of one client: to score, to train, or both, in this order.

    `message` is what the method broadcasts. `accepted` is the last round of this client whose
    upload counts, `NEVER` if none does: what the client trained after it did not happen.
    `expected` is the digest of what the server has of this client's uploads, if the next one may be
    sent as a change. `score` names the columns to score on `split`, each with the round after
    which; `keep` those rounds whose states will be asked for again. `last`: nothing comes after
    this.
    """

    TAG: ClassVar = "call"

    federation: str
    terms: str
    client: str
    round: int
    accepted: int
    train: bool
    message: Sent
    score: Mapping[str, int] = field(default_factory=dict)
    split: Split = "validation"
    keep: Mapping[str, int] = field(default_factory=dict)
    last: bool = False
    expected: str = ""


@dataclass(frozen=True)
class Score:
    """Metrics of one column after a round; numbers, never texts."""

    TAG: ClassVar = "score"

    column: str
    split: Split
    round: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Cost:
    """What a client's training of one column in a round took: mean loss, steps, tokens, seconds."""

    TAG: ClassVar = "cost"

    column: str
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What a client sends back: its upload if it trained, its scores, or why there is neither.

    `call` is the digest of the call that it answers, `accepted` the round it trained from. `lacks`:
    the call's message was a change of what is not here, and has to be sent in full.
    """

    TAG: ClassVar = "answer"

    federation: str
    terms: str
    client: str
    round: int
    accepted: int
    call: str
    upload: Sent | None = None
    scores: tuple[Score, ...] = ()
    costs: tuple[Cost, ...] = ()
    error: str = ""
    lacks: bool = False


def digest(data: bytes) -> str:
    """What tells two calls, or two agreements, apart."""
    return hashlib.sha256(data).hexdigest()[:32]
