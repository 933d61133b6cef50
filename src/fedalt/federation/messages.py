"""What server and clients of a federation say to each other, as bytes of the codec."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedalt.core.tree import Tree
from fedalt.engine.changes import Sent
from fedalt.engine.schedule import HeldOut

Step = Literal["share", "mask", "unmask"]  # of a secure sum, after training
NEVER = -1  # the round of something that has not happened


@dataclass(frozen=True)
class Call:
    """What the server asks of one client: to score, to train, or both, in this order.

    `message` is what the method broadcasts. `accepted` is the last round of this client whose
    upload counts, `NEVER` if none does: what the client trained after it did not happen.
    `expected` is the digest of what the server has of this client's uploads, if the next one may be
    sent as a change. `score` names the columns to score on `split`, each with the round after
    which; `keep` those rounds whose states will be asked for again. `last`: nothing comes after
    this. `clip` is the largest norm of a change, where it follows those of earlier rounds.
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
    split: HeldOut = "validation"
    keep: Mapping[str, int] = field(default_factory=dict)
    last: bool = False
    expected: str = ""
    clip: float = 0.0


@dataclass(frozen=True)
class Score:
    """Metrics of one column after a round; numbers, never texts."""

    TAG: ClassVar = "score"

    column: str
    split: HeldOut
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
class RoundKeys:
    """A client's public X25519 keys of one round, for masks and for shares, and its signature.

    All of them in hexadecimal digits.
    """

    TAG: ClassVar = "round-keys"

    mask: str
    share: str
    signature: str


@dataclass(frozen=True)
class Answer:
    """What a client sends back: its upload if it trained, its scores, or why there is neither.

    `call` is the digest of the call that it answers, `accepted` the round it trained from. `lacks`:
    the call's message was a change of what is not here, and has to be sent in full. `over`: it has
    an error that will not go away in this round. Where uploads are summed securely there are `keys`
    in the place of the upload.
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
    keys: RoundKeys | None = None
    over: bool = False


@dataclass(frozen=True)
class SumCall:
    """A step of a secure sum, after a client has trained; what a step is about, see secure_sum.py.

    share: the `keys` of all that have trained. mask: what each other client that has answered that
    has `sealed` for this one. unmask: the clients whose masked uploads are `present`.
    """

    TAG: ClassVar = "sum-call"

    federation: str
    terms: str
    client: str
    round: int
    step: Step
    keys: Mapping[str, RoundKeys] = field(default_factory=dict)
    sealed: Mapping[str, str] = field(default_factory=dict)
    present: tuple[str, ...] = ()


@dataclass(frozen=True)
class SumAnswer:
    """What a client answers to a step of a secure sum, bytes in hexadecimal digits.

    share: its shares, `sealed` for each other client. mask: its `masked` upload, one int32 tensor.
    unmask: its shares of the `seeds` of those in the sum, and of the secret `keys` of the others.
    `over`: it has an error that will not go away in this round.
    """

    TAG: ClassVar = "sum-answer"

    federation: str
    terms: str
    client: str
    round: int
    call: str
    sealed: Mapping[str, str] = field(default_factory=dict)
    masked: Tree = field(default_factory=dict)
    seeds: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    over: bool = False


def digest(data: bytes) -> str:
    """What tells two calls, or two agreements, apart."""
    return hashlib.sha256(data).hexdigest()[:32]
