"""Examples in batches of similar length, padded on the right, with only answers labelled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

import torch
from torch import Tensor

from fedalt.adapters.packing import Packing, branching, packing_of
from fedalt.data.examples import Example

# So many batches are drawn at random and then sorted by length: enough for little padding. An epoch
# has several such pools, or a small client would see nearly the same batches in every epoch.
_MOST_BATCHES_PER_POOL = 16
_POOLS_PER_EPOCH = 5


@dataclass(frozen=True)
class Batch:
    """The examples of C clients, client by client: padded to one length, or packed in one row.

    Padded, `ids` and `mask` are (rows, tokens), and every client has equally many rows. Packed,
    `ids` are (1, tokens), there is no mask, and `packing` says where examples begin. For a causal
    model `predicting` (n,) indexes the positions of the flattened ids whose next token belongs to
    an answer, `targets` (n,) are those tokens; for a classifier `predicting` is None and `targets`
    (rows,) are labels. `owners` says for each target which client it belongs to. `segments`, like
    ids, say which text of a pair a token belongs to, where the tokenizer told.
    """

    ids: Tensor
    mask: Tensor | None
    predicting: Tensor | None
    targets: Tensor
    owners: Tensor
    packing: Packing | None = None
    segments: Tensor | None = None


def collate(
    groups: Sequence[Sequence[Example]], pad_id: int, device: torch.device, *, pack: bool = False
) -> Batch:
    """The examples of each client in one batch; padded, every client brings equally many."""
    if not pack and len({len(group) for group in groups}) != 1:
        raise ValueError("every client of a padded batch brings equally many examples")
    examples = [example for group in groups for example in group]
    owner_of = [index for index, group in enumerate(groups) for _ in group]
    lengths = [len(example.ids) for example in examples]
    segments: Tensor | None = None
    if pack:
        ids = torch.tensor([token for example in examples for token in example.ids])[None]
        starts = list(accumulate(lengths[:-1], initial=0))
        mask, packing = (
            None,
            packing_of([[len(example.ids) for example in group] for group in groups], device),
        )
    else:
        width = max(lengths)
        ids = torch.full((len(examples), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            mask[row, : len(example.ids)] = 1
            if example.segments:
                segments = torch.zeros_like(ids) if segments is None else segments
                segments[row, : len(example.ids)] = torch.tensor(example.segments)
        starts = [row * width for row in range(len(examples))]
        mask, packing = mask.to(device), None
    if examples[0].label is not None:
        predicting = None
        targets = torch.tensor([example.label for example in examples])
        owners = torch.tensor(owner_of)
    else:
        # The token before an answer's first one predicts it; an answer that begins the text has
        # nothing before it, so its first token carries no loss.
        spans = [
            torch.tensor([*example.earlier, *range(max(example.answer_start, 1), len(example.ids))])
            + start
            for example, start in zip(examples, starts, strict=True)
        ]
        answers = torch.cat(spans)
        predicting = (answers - 1).to(device)
        targets = ids.flatten()[answers]
        owners = torch.cat(
            [torch.full_like(span, who) for span, who in zip(spans, owner_of, strict=True)]
        )
    segments = None if segments is None else segments.to(device)
    targets, owners = targets.to(device), owners.to(device)
    return Batch(ids.to(device), mask, predicting, targets, owners, packing, segments)


def answers_in_one(groups: Sequence[Sequence[Sequence[Example]]], device: torch.device) -> Batch:
    """Several answers to each question in one packed row, the prompt before them only once.

    The questions stand client by client. The examples of a question have the same prompt, which is
    not empty. `owners` number the examples of all questions. The last token of an answer predicts
    nothing and is left out. Earlier answers in the prompt count to each of its answers.
    """
    ids: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    texts: list[list[tuple[int, list[int]]]] = []
    before = 0
    for questions in groups:
        texts.append([])
        for question in questions:
            prompt, earlier = question[0].prompt_ids, question[0].earlier
            first, last = len(ids), len(ids) + len(prompt) - 1
            ids += prompt
            answers = [example.ids[len(prompt) :] for example in question]
            for owner, answer in enumerate(answers, before):
                owners += [owner] * (len(earlier) + len(answer))
                targets += [*(prompt[at] for at in earlier), *answer]
                predicting += [first + at - 1 for at in earlier]
                predicting += [last, *range(len(ids), len(ids) + len(answer) - 1)][: len(answer)]
                ids += answer[:-1]
            before += len(answers)
            texts[-1].append((len(prompt), [max(len(answer) - 1, 0) for answer in answers]))
    row, rows, labels, whose = (
        torch.tensor(numbers, device=device) for numbers in (ids, predicting, targets, owners)
    )
    return Batch(row[None], None, rows, labels, whose, branching(texts, device))


def epoch_order(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Indices of one epoch's batches: random, but of similar length within a batch."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    most = steps_per_epoch(len(lengths), batch_size) // _POOLS_PER_EPOCH
    size = batch_size * max(1, min(most, _MOST_BATCHES_PER_POOL))
    batches = []
    for first in range(0, len(shuffled), size):
        pool = sorted(shuffled[first : first + size], key=lambda index: lengths[index])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[index]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """How many batches `epoch_order` yields."""
    return -(-examples // batch_size)


def in_turn(
    sizes: Sequence[Sequence[int]], batch_size: int, tokens: float = inf
) -> Iterator[list[tuple[int, list[int]]]]:
    """Batches for scoring, filled from clients in turn: clients, and which of each one's items.

    `sizes` are tokens of each client's items. The longest come first, of the clients and of each
    one's items, so that too little memory shows at once. A client shares a batch with others only
    while it has at most `tokens` in all.
    """
    batch: list[tuple[int, list[int]]] = []
    items = held = 0
    for client in sorted(range(len(sizes)), key=lambda at: -max(sizes[at], default=0)):
        for item in sorted(range(len(sizes[client])), key=lambda at: -sizes[client][at]):
            size = sizes[client][item]
            shared = bool(batch) and (len(batch) > 1 or batch[0][0] != client)
            if items == batch_size or (shared and held + size > tokens):
                yield batch
                batch, items, held = [], 0, 0
            if not batch or batch[-1][0] != client:
                batch.append((client, []))
            batch[-1][1].append(item)
            items, held = items + 1, held + size
    if batch:
        yield batch
