"""What the data doctor measures of a folder, and what of it deserves a warning."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from fedalt.core.foreign import listed, shown
from fedalt.data.examples import Kind
from fedalt.data.layouts import not_read

FEWEST_TO_JUDGE = 20  # records, below which an order or a balance says nothing

BalanceOf = Literal["label", "answer", "position", "nothing"]


@dataclass(frozen=True)
class Lengths:
    """Tokens per example, prompt and answer together, before anything is cut."""

    mean: float
    p50: int
    p95: int
    longest: int


@dataclass(frozen=True)
class SplitReport:
    """One client's records of one split.

    `answer_share` is the part of all tokens that the loss is on, `unknown_share` the part that the
    tokenizer does not know, both from 0 to 1. `truncated_prompts`, `answers_too_long` (those lose
    their end), `empty_answers`, `off_options` (the answer is not among the listed options) and
    `duplicates` (exact repetitions) count records. `balance` counts what `balance_of` of the
    client says; `runs` are the stretches of equal ones in the file's order, `longest_run` the
    longest, `shuffled_runs` how many a shuffled file would have on average; `looks_sorted`: far
    fewer than that.
    """

    records: int
    tokens: Lengths
    answer_share: float
    unknown_share: float
    empty_answers: int
    truncated_prompts: int
    answers_too_long: int
    off_options: int
    duplicates: int
    balance: dict[str, int]
    runs: int
    longest_run: int
    shuffled_runs: float
    looks_sorted: bool


@dataclass(frozen=True)
class ClientReport:
    """One client: its splits, and how its train and test data go together.

    `balance_of` says what the balances count: labels, answers (where they are few), the position
    of the right answer among the options, or nothing (free text). `distance` is half the sum of
    absolute differences between the shares in train and in test, from 0 (equal) to 1. `overlap`
    counts test records whose question and answer are in train, apart from case and white space;
    `question_overlap` those whose question is; `elsewhere` those that are in the train data of
    other clients, most of them in `elsewhere_client`. `validation_overlap` counts validation
    records that are in train, `validated` test records that are in validation.
    """

    client_id: str
    splits: dict[str, SplitReport]
    balance_of: BalanceOf
    distance: float | None
    overlap: int
    question_overlap: int
    elsewhere: int
    elsewhere_client: str | None
    validation_overlap: int
    validated: int


@dataclass(frozen=True)
class DataReport:
    """A whole folder: JSON-able with `dataclasses.asdict`.

    `example` is a train example as text: the part without loss and the part with it.
    """

    path: str
    kind: Kind
    labels: tuple[str, ...]
    fingerprint: str
    max_length: int
    ignored: tuple[str, ...]
    clients: tuple[ClientReport, ...]
    example_client: str
    example: tuple[str, str]
    warnings: tuple[str, ...]


def warnings_of(
    clients: Sequence[ClientReport],
    ignored: tuple[str, ...],
    max_length: int,
    model_length: int,
    labels: Sequence[str],
) -> Iterator[str]:
    """What deserves a warning, in sentences: of the whole folder, then of each client."""
    yield from _alike(labels, "label")
    if ignored:
        yield not_read(ignored)
    if untested := [client.client_id for client in clients if "test" not in client.splits]:
        who = "no client has" if len(untested) == len(clients) else f"{listed(untested)}: without"
        yield f"{who} test data; such a client is trained but not scored"
    if max_length > model_length:
        yield (
            f"max_length={max_length} is more than the {model_length} tokens this tokenizer's "
            "model was made for"
        )
    for client in clients:
        for sentence in _client_warnings(client, max_length):
            yield f"client {client.client_id}: {sentence}"


def _client_warnings(client: ClientReport, max_length: int) -> Iterator[str]:
    for split, report in client.splits.items():
        yield from _split_warnings(split, report, max_length)
    train, test = client.splits["train"], client.splits.get("test")
    if test is not None:
        yield from _pair_warnings(client, train, test)
    if client.validation_overlap:
        yield (
            f"{client.validation_overlap} of {client.splits['validation'].records} validation "
            "records are in its train data too, so their loss rewards memorising"
        )
    if client.balance_of == "answer":
        answers = dict.fromkeys(name for split in client.splits.values() for name in split.balance)
        yield from _alike(answers, "answer")


def _alike(names: Iterable[str], what: str) -> Iterator[str]:
    """A sentence for every two names that a reader may take for one."""
    seen: dict[str, str] = {}
    for name in names:
        letters = unicodedata.normalize("NFKC", name).casefold()
        alike = " ".join(unicodedata.normalize("NFKC", letters).split())
        if re.fullmatch(r"-?[0-9]{1,18}", alike):
            alike = str(int(alike))
        other = seen.setdefault(alike, name)
        if other != name:
            yield (
                f"the {what}s {_spelt(other)} and {_spelt(name)} are two, but differ only in case, "
                "white space, leading zeros or how Unicode spells them"
            )


def _spelt(name: str) -> str:
    """A name in quotation marks; with its letters as numbers where others look the same."""
    return repr(shown(name, 80)) if name.isascii() else f"{shown(name, 80)!r} ({ascii(name)[:80]})"


def _split_warnings(split: str, report: SplitReport, max_length: int) -> Iterator[str]:
    of = f"of {report.records} {split} records"
    for count, what in (
        (report.empty_answers, "have an empty answer"),
        (report.truncated_prompts, f"lose a part of their text at max_length={max_length}"),
        (report.answers_too_long, f"lose the end of their answer at max_length={max_length}"),
        (report.off_options, "have an answer that is not among their options"),
        (report.duplicates * (split == "train"), "repeat another one exactly"),
    ):
        if count:
            yield f"{count} {of} {what}"
    if report.looks_sorted:
        yield (
            f"the {split} file is sorted by its answers ({report.runs} stretches of equal ones, "
            f"where a shuffled file has about {report.shuffled_runs:.0f}; the longest is "
            f"{report.longest_run} of {report.records}): its first lines are no fair sample"
        )
    if report.unknown_share > 0.01:
        yield f"the tokenizer does not know {report.unknown_share:.0%} of the tokens in {split}"


def _pair_warnings(client: ClientReport, train: SplitReport, test: SplitReport) -> Iterator[str]:
    of = f"of {test.records} test records"
    if client.overlap:
        yield f"{client.overlap} {of} are in its train data too"
    if client.validated:
        yield f"{client.validated} {of} are in its validation data too, which chooses the round"
    if client.question_overlap > client.overlap:
        other = client.question_overlap - client.overlap
        yield f"{other} {of} have a question of its train data, with another answer"
    if client.elsewhere:
        yield (
            f"{client.elsewhere} {of} are in the train data of other clients, "
            f"first of all {client.elsewhere_client}"
        )
    if client.balance_of == "nothing" or client.distance is None:
        return
    what = "right position" if client.balance_of == "position" else client.balance_of
    if client.distance > 0.1 and _differ(train, test):
        yield (
            f"train and test differ in how often each {what} occurs "
            f"(distance {client.distance:.2f} of at most 1)"
        )
    if missing := sorted(test.balance.keys() - train.balance.keys()):
        yield f"the {what} {missing[0]!r} is in test but never in train"
    if len(train.balance) == 1 and train.records >= FEWEST_TO_JUDGE:
        yield f"every train record has the same {what}, {min(train.balance)!r}"


def _differ(train: SplitReport, test: SplitReport) -> bool:
    """Whether two balances differ more than two fair samples of one source would (chi-squared)."""
    from scipy.stats import chi2_contingency  # whose import takes long, and few ask

    names = train.balance.keys() | test.balance.keys()
    counts = [[split.balance.get(name, 0) for name in names] for split in (train, test)]
    result = chi2_contingency(counts, correction=False)
    return bool(result.statistic > result.dof + 4 * sqrt(2 * result.dof))  # its mean and spread
