"""What an answer may hold: the schema that it is held against before it is kept anywhere.

A member checks its own answers against it too, so nobody honest sends what a server refuses. The
tensors of an upload have a check of their own, `engine.firewall.check_upload`.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from fedalt.core.tree import on
from fedalt.engine.adaptive_clip import WITHIN
from fedalt.engine.changes import whole
from fedalt.engine.client_work import TRAINED
from fedalt.engine.dry_run import Form
from fedalt.engine.firewall import Refused, quoted
from fedalt.engine.schedule import HeldOut
from fedalt.federation.agreement import Agreement
from fedalt.federation.messages import NEVER, Answer, Call, Cost, Score
from fedalt.methods.contract import Message

MOST_COUNTS: Final = 32
LONGEST_ERROR: Final = 600  # characters; honest clients cut theirs before that


@dataclass(frozen=True)
class Range:
    """The numbers that a metric may be: both ends belong to it, NaN and infinity never do."""

    least: float
    most: float
    whole: bool = False

    def require(self, number: float, what: str) -> None:
        """Refuse what lies outside."""
        fits = math.isfinite(number) and self.least <= number <= self.most
        if not fits or (self.whole and number != int(number)):
            kind = "a whole number" if self.whole else "a number"
            raise Refused(
                f"{what} is {number!r}, expected {kind} from {self.least:g} to {self.most:g}"
            )


# Nats, counts and seconds have no upper end by nature; these are beyond what anybody comes to,
# and small enough for sums over many clients.
LOSS: Final = Range(0, 1e9)
COUNT: Final = Range(0, 1e15, whole=True)
SECONDS: Final = Range(0, 1e9)
SHARE: Final = Range(0, 1)
PERCENT: Final = Range(0, 100)

TRAINING: Final = {"loss": LOSS, "steps": COUNT, "tokens": COUNT}
LIKELIHOOD: Final = {"loss": LOSS}
OPTIONS: Final = {"accuracy": SHARE}
TEXTS: Final = {"exact_match": SHARE, "rouge1": PERCENT, "rougeL": PERCENT}


@dataclass(frozen=True)
class Metrics:
    """The metrics that a score or cost has, and those that it may have beside them.

    `counts` matches names of further ones, few of them, which are counts.
    """

    needed: Mapping[str, Range]
    optional: Mapping[str, Range] = field(default_factory=dict)
    counts: re.Pattern[str] | None = None

    def require(self, given: Mapping[str, float], what: str) -> None:
        """Refuse a metric too few or too many, and a number outside its range."""
        if missing := self.needed.keys() - given.keys():
            raise Refused(f"{what} has no {min(missing)!r}")
        counted = [key for key in given if self.counts and self.counts.fullmatch(key)]
        if len(counted) > MOST_COUNTS:
            raise Refused(f"{what} has {len(counted)} counts, expected at most {MOST_COUNTS}")
        known = {**self.needed, **self.optional, **dict.fromkeys(counted, COUNT)}
        if unknown := given.keys() - known.keys():
            raise Refused(f"{what} has the unknown metric {quoted(min(unknown))}")
        for key, number in given.items():
            known[key].require(number, f"{what}: {key}")


def metrics_of(agreement: Agreement, split: HeldOut) -> Metrics:
    """The metrics of a score on a split under these terms.

    Labels are always compared with their options, answers only where a client's records list some;
    texts are written for test data alone, and not where that is switched off.
    """
    if agreement.labels:
        return Metrics(LIKELIHOOD | OPTIONS)
    written = TEXTS if split == "test" and agreement.settings.scoring.generate else {}
    return Metrics(LIKELIHOOD | written, OPTIONS)


# How many numbers of a slot and factor were trained.
COUNTED: Final = re.compile(rf"{TRAINED}[a-z0-9_]{{1,40}} [A-Za-z]{{1,20}}")


def costs_of(agreement: Agreement, column: str) -> Metrics:
    """The metrics of a cost of a column under these terms.

    A client says what it has spent of privacy where it keeps its own ledger, and whether its change
    was clipped where the clip follows that; else it would be recorded as if it were so.
    """
    privacy, may = agreement.settings.privacy, dict[str, Range]()
    if column == "own" and privacy.unit == "example":
        may["epsilon"] = LOSS
    if column == "own" and privacy.quantile is not None:
        may[WITHIN] = SHARE
    return Metrics(TRAINING, may, COUNTED)


@dataclass(frozen=True)
class Asked:
    """What a call asked for, without the broadcast: what its answer is held against.

    `trains` are the columns that train, `scores` those that are scored, each with its round; on
    test data the shared part and the base model are among them, where there are such scores.
    """

    client: str
    round: int
    accepted: int
    digest: str
    trains: Collection[str]
    scores: Mapping[str, int]
    split: HeldOut


def asked_of(call: Call, digest: str, agreement: Agreement) -> Asked:
    """What a call asks of a client."""
    columns = agreement.columns
    scores = {column: call.score[column] for column in columns if column in call.score}
    own = scores.get("own")
    if own is not None and call.split == "test" and _has_shared(call, agreement):
        scores["shared"] = own
    if own is not None and call.split == "test" and has_base(agreement):
        scores["base"] = NEVER
    trains = columns if call.train else ()
    return Asked(call.client, call.round, call.accepted, digest, trains, scores, call.split)


def has_base(agreement: Agreement) -> bool:
    """Whether clients test the base model, too; not a classifier's, whose head may be drawn."""
    return agreement.settings.scoring.base and not agreement.init.heads


def _has_shared(call: Call, agreement: Agreement) -> bool:
    """Whether a client would score the shared part alone after this call's broadcast."""
    method = agreement.settings.method
    with torch.device("meta"):
        client = method.init_client(agreement.init, call.client)
        message = whole(call.message)
        sent = Message(on(message.tree, "meta"), message.facts)
        return method.shared(client, sent) is not None


def check_answer(answer: Answer, asked: Asked, agreement: Agreement) -> None:
    """Refuse an answer that is anything but what was asked for, or why it could not be done.

    A client without examples of a split scores nothing, others score all that was asked for.
    """
    _check_sender(answer, asked, agreement)
    if answer.lacks and not answer.error:
        raise Refused("it lacks what the call is a change of, and does not say so")
    if answer.over and not answer.error:
        raise Refused("it will not do this round, and does not say why")
    if answer.error:
        _check_error(answer, asked)
        return
    if answer.round != asked.round:
        raise Refused(
            f"it is of round {answer.round + 1}, but round {asked.round + 1} was asked for"
        )
    if answer.call != asked.digest:
        raise Refused(f"it answers another call than the one of round {asked.round + 1}")
    if answer.accepted != asked.accepted:
        raise Refused(f"it goes on from round {answer.accepted + 1}, which is not the last counted")
    secure = agreement.settings.privacy.secure_sum
    _check_sent("upload", answer.upload is not None, wanted=bool(asked.trains) and not secure)
    _check_sent("key", answer.keys is not None, wanted=bool(asked.trains) and secure)
    _check_columns([cost.column for cost in answer.costs], asked.trains, "the cost")
    for cost in answer.costs:
        _check_cost(cost, agreement)
    if answer.scores:
        _check_columns([score.column for score in answer.scores], asked.scores, "the score")
        metrics = metrics_of(agreement, asked.split)
        for score in answer.scores:
            _check_score(score, asked, metrics)


def _check_sent(what: str, there: bool, *, wanted: bool) -> None:
    """Refuse an upload, or keys of a secure sum in its place, that is missing or not wanted."""
    if there != wanted:
        raise Refused(f"it has no {what}" if wanted else f"its {what} was not asked for")


def _check_sender(answer: Answer, asked: Asked, agreement: Agreement) -> None:
    for what, theirs, ours in (
        ("federation", answer.federation, agreement.name),
        ("terms", answer.terms, agreement.digest),
        ("client", answer.client, asked.client),
    ):
        if theirs != ours:
            raise Refused(f"it is from {what} {quoted(theirs)}, but {ours!r} was called")


def _check_error(answer: Answer, asked: Asked) -> None:
    """An answer that says why it could not be done says nothing else."""
    if answer.upload is not None or answer.keys is not None or answer.scores or answer.costs:
        raise Refused("it has an error and something beside it")
    if len(answer.error) > LONGEST_ERROR or not answer.error.isprintable():
        raise Refused(
            f"its error is {quoted(answer.error)}, expected at most {LONGEST_ERROR} printable "
            "characters"
        )
    for what, theirs, ours in (
        ("round", answer.round, asked.round),
        ("last counted round", answer.accepted, asked.accepted),
    ):
        if theirs not in (ours, NEVER):  # a client that could not read the call knows neither
            raise Refused(f"it has an error about {what} {theirs + 1}, expected {ours + 1}")
    if answer.call != asked.digest:
        raise Refused(f"it has an error about another call than the one of round {asked.round + 1}")


def _check_columns(given: Collection[str], expected: Collection[str], what: str) -> None:
    if unknown := set(given) - set(expected):
        raise Refused(f"{what} of column {quoted(min(unknown))} was not asked for")
    if missing := set(expected) - set(given):
        raise Refused(f"{what} of column {min(missing)!r} is missing")
    if len(given) != len(expected):
        raise Refused(f"{what} of a column is there twice")


def _check_cost(cost: Cost, agreement: Agreement) -> None:
    what = f"the cost of column {cost.column!r}"
    costs_of(agreement, cost.column).require(cost.metrics, what)
    SECONDS.require(cost.seconds, f"{what}: seconds")


def check_trained(costs: Iterable[Cost], forms: Mapping[str, Sequence[Form]]) -> None:
    """Refuse costs that count other trained numbers than a dry run of their columns does."""
    for cost in costs:
        given = {key: n for key, n in cost.metrics.items() if key.startswith(TRAINED)}
        known = [
            {f"{TRAINED}{slot} {factor}": n for (slot, factor), n in form.trained.items()}
            for form in forms[cost.column]
        ]
        if given not in known:
            raise Refused(
                f"the cost of column {cost.column!r} counts {quoted(str(given))} trained numbers, "
                f"expected {known[-1]}"
            )


def _check_score(score: Score, asked: Asked, metrics: Metrics) -> None:
    what = f"the score of column {score.column!r}"
    if score.split != asked.split:
        raise Refused(f"{what} is of the {score.split} data, expected {asked.split}")
    if score.round != asked.scores[score.column]:
        raise Refused(
            f"{what} is of round {score.round + 1}, expected {asked.scores[score.column] + 1}"
        )
    metrics.require(score.metrics, what)
