"""Examples in batches of similar length, padded on the right, with only answers labelled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalt.data.examples import Example

# So many batches are drawn at random and then sorted by length: enough for little padding, few
# enough that an epoch's order stays random.
_BATCHES_PER_SORT = 16


@dataclass(frozen=True)
class Batch:
    """A padded batch of equally many rows for each of C clients, client by client.

    `ids` and `mask` are (rows, tokens). For a causal model `predicting` (n,) indexes the positions
    of the flattened ids whose next token belongs to an answer, `targets` (n,) are those tokens;
    for a classifier `predicting` is None and `targets` (rows,) are labels. `owners` says for each
    target which client it belongs to.
    """

    ids: Tensor
    mask: Tensor
    predicting: Tensor | None
    targets: Tensor
    owners: Tensor


def collate(groups: Sequence[Sequence[Example]], pad_id: int, device: torch.device) -> Batch:
    """Pad the examples of each client to one batch; every client brings equally many."""
    if len({len(group) for group in groups}) != 1:
        raise ValueError("every client of a batch brings equally many examples")
    examples = [example for group in groups for example in group]
    owner_of = [index for index, group in enumerate(groups) for _ in group]
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
    if examples[0].label is not None:
        predicting = None
        targets = torch.tensor([example.label for example in examples])
        owners = torch.tensor(owner_of)
    else:
        # The token before an answer's first one predicts it; an answer that begins the text has
        # nothing before it, so its first token carries no loss.
        spans = [
            torch.arange(max(example.answer_start, 1), len(example.ids)) + row * width
            for row, example in enumerate(examples)
        ]
        answers = torch.cat(spans)
        predicting = (answers - 1).to(device)
        targets = ids.flatten()[answers]
        owners = torch.cat(
            [torch.full_like(span, who) for span, who in zip(spans, owner_of, strict=True)]
        )
    return Batch(ids.to(device), mask.to(device), predicting, targets.to(device), owners.to(device))


def epoch_order(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Indices of one epoch's batches: random, but of similar length within a batch."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * _BATCHES_PER_SORT
    batches = []
    for first in range(0, len(shuffled), size):
        pool = sorted(shuffled[first : first + size], key=lambda index: lengths[index])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[index]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """How many batches `epoch_order` yields."""
    whole, rest = divmod(examples, batch_size * _BATCHES_PER_SORT)
    return whole * _BATCHES_PER_SORT + -(-rest // batch_size)


def by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches for scoring: longest first, so that too little memory shows at once."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].ids))
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]
