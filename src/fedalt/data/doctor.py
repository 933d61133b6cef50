"""The data doctor: measures a folder of client data as a model's tokenizer sees it."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedalt.data.data_report import (
    FEWEST_TO_JUDGE,
    BalanceOf,
    ClientReport,
    DataReport,
    Lengths,
    SplitReport,
    warnings_of,
)
from fedalt.data.folder import DataFolder
from fedalt.data.layouts import SPLITS
from fedalt.data.prompts import Encoded, Template, masked_example
from fedalt.data.records import Record, question_key, record_key
from fedalt.data.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MOST_ANSWERS = 20  # more different ones are free text
FEWEST_OF_EACH = 5  # records per different answer on average, fewer are free text

SHORT_OF_RUNS = 0.5  # of the runs that a shuffled file would have

Keys = NDArray[np.uint64]


def check(
    folder: DataFolder, tokenizer: "Tokenizer", template: Template, max_length: int
) -> DataReport:
    """Look at every record; some 30 bytes per train record are held, the text of one client."""

    def task() -> Task:  # one for each client, as it keeps what it has encoded
        return Task(
            folder=folder,
            tokenizer=tokenizer,
            template=template,
            max_length=max_length,
            cut_answers=True,
        )

    elsewhere = _trained_elsewhere(folder)
    clients = tuple(
        _client_report(task(), client_id, *elsewhere[client_id]) for client_id in folder.clients
    )
    first = folder.clients[0]
    return DataReport(
        path=str(folder.path),
        kind=folder.kind,
        labels=folder.labels,
        fingerprint=folder.fingerprint,
        max_length=max_length,
        ignored=folder.ignored,
        clients=clients,
        example_client=first,
        example=masked_example(task().examples(first, "train")[0], tokenizer),
        warnings=tuple(
            warnings_of(
                clients, folder.ignored, max_length, int(tokenizer.model_max_length), folder.labels
            )
        ),
    )


def _trained_elsewhere(folder: DataFolder) -> dict[str, tuple[int, str | None]]:
    """Per client: how many of its test records others train on, and which client most."""
    keys = [_keys(folder.records(client_id, "train")) for client_id in folder.clients]
    all_keys = np.concatenate(keys)
    owners = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(part) for part in keys])
    order = np.argsort(all_keys, kind="stable")
    all_keys, owners = all_keys[order], owners[order]
    elsewhere: dict[str, tuple[int, str | None]] = {}
    for index, client_id in enumerate(folder.clients):
        test = _keys(folder.records(client_id, "test"))
        begins = np.searchsorted(all_keys, test, side="left")
        ends = np.searchsorted(all_keys, test, side="right")
        seen: Counter[int] = Counter()
        records = 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            others = set(owners[begin:end].tolist()) - {index}
            seen.update(sorted(others))
            records += bool(others)
        most = folder.clients[seen.most_common(1)[0][0]] if seen else None
        elsewhere[client_id] = (records, most)
    return elsewhere


def _keys(records: Sequence[Record]) -> Keys:
    return np.array([record_key(record) for record in records], dtype=np.uint64)


def _client_report(
    task: Task, client_id: str, elsewhere: int, elsewhere_client: str | None
) -> ClientReport:
    records = {split: task.folder.records(client_id, split) for split in SPLITS}
    records = {split: part for split, part in records.items() if part}
    balance_of = _balance_of([record for part in records.values() for record in part])
    splits: dict[str, SplitReport] = {
        split: _split_report(part, task.encoded(client_id, split), task.tokenizer, balance_of)
        for split, part in records.items()
    }
    train, test, validation = (records.get(split, []) for split in ("train", "test", "validation"))
    trained, validating = ({record_key(record) for record in part} for part in (train, validation))
    asked = {question_key(record) for record in train}
    return ClientReport(
        client_id=client_id,
        splits=splits,
        balance_of=balance_of,
        distance=_distance(splits["train"], splits.get("test")),
        overlap=sum(record_key(record) in trained for record in test),
        question_overlap=sum(question_key(record) in asked for record in test),
        elsewhere=elsewhere,
        elsewhere_client=elsewhere_client,
        validation_overlap=sum(record_key(record) in trained for record in validation),
        validated=sum(record_key(record) in validating for record in test),
    )


def _split_report(
    records: Sequence[Record],
    encoded: Sequence[Encoded],
    tokenizer: "Tokenizer",
    balance_of: BalanceOf,
) -> SplitReport:
    lengths = np.array([len(e.example.ids) + e.prompt_cut + e.answer_cut for e in encoded])
    p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf").tolist()
    used = sum(len(e.example.ids) for e in encoded)
    answered = sum(len(e.example.ids) - e.example.answer_start for e in encoded)
    unknown = tokenizer.unk_token_id
    # GPT-2 and its like know every byte and call their end-of-text token unknown.
    real = unknown is not None and unknown != tokenizer.eos_token_id
    strange = sum(e.example.ids.count(unknown) for e in encoded) if real else 0
    names = [_name(record, balance_of) for record in records if balance_of != "nothing"]
    balance = Counter(names)
    runs, shuffled = sum(1 for _ in groupby(names)), _shuffled_runs(balance)
    return SplitReport(
        records=len(records),
        tokens=Lengths(float(lengths.mean()), int(p50), int(p95), int(lengths.max())),
        answer_share=answered / used,
        unknown_share=strange / used,
        empty_answers=sum(not record.answer.strip() for record in records),
        truncated_prompts=sum(e.prompt_cut > 0 for e in encoded),
        answers_too_long=sum(e.answer_cut > 0 for e in encoded),
        off_options=sum(
            bool(record.options) and record.answer not in record.options for record in records
        ),
        duplicates=len(records) - len(set(records)),
        balance=dict(sorted(balance.items())),
        runs=runs,
        longest_run=max((len(list(run)) for _, run in groupby(names)), default=0),
        shuffled_runs=shuffled,
        looks_sorted=len(balance) > 1
        and len(records) >= FEWEST_TO_JUDGE
        and runs < SHORT_OF_RUNS * shuffled,
    )


def _balance_of(records: Sequence[Record]) -> BalanceOf:
    """What can be counted: labels, few different answers, or where the right option stands."""
    if records[0].kind == "classify":
        return "label"
    answers = {record.answer.strip() for record in records}
    if len(answers) <= MOST_ANSWERS and len(answers) * FEWEST_OF_EACH <= len(records):
        return "answer"
    if sum(record.answer in record.options for record in records) > len(records) / 2:
        return "position"
    return "nothing"


def _name(record: Record, balance_of: BalanceOf) -> str:
    if balance_of != "position":
        return record.answer.strip()
    options = record.options
    return str(options.index(record.answer) + 1) if record.answer in options else "none"


def _shuffled_runs(balance: Counter[str]) -> float:
    """How many stretches of equal names these counts give on average in random order."""
    records = sum(balance.values())
    if not records:
        return 0.0
    return 1 + records - sum(count * count for count in balance.values()) / records


def _distance(train: SplitReport, test: SplitReport | None) -> float | None:
    """Total variation between the two balances; None where one is missing."""
    if test is None or not train.balance or not test.balance:
        return None
    return (
        sum(
            abs(
                train.balance.get(name, 0) / train.records
                - test.balance.get(name, 0) / test.records
            )
            for name in train.balance.keys() | test.balance.keys()
        )
        / 2
    )
