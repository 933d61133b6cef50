"""What training and evaluation read: a folder of client data, tokenised, with its three splits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from fedalt.core.seeds import generator
from fedalt.data.examples import Example, Kind, Split
from fedalt.data.folder import DataFolder
from fedalt.data.prompts import Encoded, Template, encode
from fedalt.data.records import DataError, Problems, Record, record_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

KEPT_IN_MEMORY = 16  # (client, split) pairs
FEWEST_TO_HOLD_OUT = 10  # train records


@dataclass(frozen=True, kw_only=True)
class Task:
    """Client data as examples of at most `max_length` tokens.

    `validation` is the fraction of a client's train records that is held out (drawn by `seed`)
    where the client has no validation file; 0 holds out nothing. An answer that does not fit is
    an error, unless `cut_answers` allows to keep its beginning: `cut` then tells how many were.
    With `all_answers` earlier answers of a train conversation are trained, too.
    """

    folder: DataFolder
    tokenizer: "Tokenizer" = field(repr=False)
    template: Template = field(default_factory=Template)
    max_length: int = 512
    validation: float = 0.0
    seed: int = 0
    cut_answers: bool = False
    all_answers: bool = False
    _encoded: Callable[[str, Split], tuple[Encoded, ...]] = field(
        init=False, repr=False, compare=False
    )
    _lengths: dict[str, tuple[int, float]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(
                f"validation={self.validation}, but a held-out fraction is at least 0 and below 1"
            )
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}, but an example has at least 2 tokens")
        # Bounded, so that memory does not grow with the number of clients.
        recent = lru_cache(maxsize=KEPT_IN_MEMORY)(self._encode)
        object.__setattr__(self, "_encoded", recent)

    @property
    def clients(self) -> tuple[str, ...]:
        """All client ids, sorted."""
        return self.folder.clients

    @property
    def kind(self) -> Kind:
        """Whether text is generated or a label is given."""
        return self.folder.kind

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's labels; an example's label is an index into them."""
        return self.folder.labels

    def examples(self, client_id: str, split: Split) -> list[Example]:
        """A client's examples in the order of its file; test files are read for "test" alone."""
        return [encoded.example for encoded in self.encoded(client_id, split)]

    def encoded(self, client_id: str, split: Split) -> tuple[Encoded, ...]:
        """The same examples, each with what the maximal length took from it."""
        return self._encoded(client_id, split)

    def training_size(self, client_id: str) -> tuple[int, float]:
        """How many training examples a client has, and their mean number of tokens."""
        if client_id not in self._lengths:
            lengths = [len(example.ids) for example in self.examples(client_id, "train")]
            self._lengths[client_id] = len(lengths), sum(lengths) / max(len(lengths), 1)
        return self._lengths[client_id]

    def cut(self, client_id: str, split: Split) -> tuple[int, int]:
        """How many of these examples have a cut prompt, and how many a cut answer."""
        all_encoded = self.encoded(client_id, split)
        return (
            sum(encoded.prompt_cut > 0 for encoded in all_encoded),
            sum(encoded.answer_cut > 0 for encoded in all_encoded),
        )

    def records(self, client_id: str, split: Split) -> list[Record]:
        """A client's records of a split, with the held-out part of train moved to validation."""
        return [record for _, record in self._records(client_id, split)[1]]

    def _records(self, client_id: str, split: Split) -> tuple[Split, list[tuple[int, Record]]]:
        """The split whose file has these records, and each with its number there, from 0."""
        if split == "test" or self.validation == 0 or self.folder.counts(client_id, "validation"):
            return split, list(enumerate(self.folder.records(client_id, split)))
        records = self.folder.records(client_id, "train")
        wanted = min(len(records) - 1, max(1, round(self.validation * len(records))))
        if len(records) < FEWEST_TO_HOLD_OUT:
            wanted = 0
        held = hold_out(
            [record_key(record) for record in records],
            wanted,
            generator(self.seed, "validation", client_id),
        )
        return "train", [
            (index, record)
            for index, record in enumerate(records)
            if (index in held) == (split == "validation")
        ]

    def _encode(self, client_id: str, split: Split) -> tuple[Encoded, ...]:
        """DataError with the file and line of every record that cannot be encoded."""
        examples, refused = [], {}
        of, records = self._records(client_id, split)
        for number, record in records:
            try:
                examples.append(self._encode_one(record, split))
            except DataError as error:
                refused[number] = str(error)
        if refused:
            problems, places = Problems(self.folder.path), self.folder.places(client_id, of)
            for number, text in refused.items():
                place = f"{places[number]}: client {client_id!r}, {of} record {number + 1}"
                problems.add(place, text)
            problems.raise_if_any()
        return tuple(examples)

    def _encode_one(self, record: Record, split: Split) -> Encoded:
        encoded = encode(
            record,
            self.tokenizer,
            self.template,
            max_length=self.max_length,
            labels=self.labels,
            all_answers=self.all_answers and split == "train",
        )
        if encoded.answer_cut and not self.cut_answers:
            raise DataError(
                f"the answer is {encoded.answer_cut} tokens too long for "
                f"max_length={self.max_length}; raise it, shorten the answer, or allow to cut it"
            )
        return encoded


def hold_out(keys: Sequence[int], wanted: int, random: torch.Generator) -> set[int]:
    """Indices of about `wanted` records, drawn so that equal keys stay together.

    Never more than wanted, and fewer only where the remaining groups of equal keys are too large.
    """
    groups: dict[int, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    in_order = list(groups.values())
    held: set[int] = set()
    for position in torch.randperm(len(in_order), generator=random).tolist():
        if len(held) + len(in_order[position]) <= wanted:
            held.update(in_order[position])
    return held
