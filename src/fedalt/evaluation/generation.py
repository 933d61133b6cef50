"""Answers written by several clients' models at once."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fedalt.core.settings import Scoring
from fedalt.data.answers import without_end
from fedalt.evaluation.asking import ends, fitted, greedily, longest_answer, without_card
from fedalt.evaluation.cache import cache_for, can_select
from fedalt.evaluation.group import Group, Ids, Share, Shares, shares_of, sizes_of, within_memory
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.training.batches import in_turn


@torch.no_grad()
def generate(
    base: Base, serving: Serving | None, prompts: Sequence[Ids], scoring: Scoring
) -> list[str]:
    """Write an answer to every prompt: greedy or beam search, never sampled.

    Of the model's own generation settings only the end tokens count. A prompt that leaves no room
    for an answer loses a part of its middle. Without a serving the base model answers as it is.
    """
    group = Group(base, [] if serving is None else [serving])
    asked = [[fitted(base, prompt, scoring) for prompt in prompts]]
    return written(group, asked, shares_of(group, asked, scoring.batch_size), scoring)[0]


def written(
    group: Group, prompts: Sequence[Sequence[Ids]], shares: Shares | None, scoring: Scoring
) -> list[list[str]]:
    """An answer to every prompt of every client; the prompts are `fitted`."""
    base = group.base
    answers = [[""] * len(of_client) for of_client in prompts]
    kinds = [[_kind(base, prompt, scoring) for prompt in of_client] for of_client in prompts]
    for kind in sorted({kind for of_client in kinds for kind in of_client}):
        alike = [[at for at, other in enumerate(of_client) if other == kind] for of_client in kinds]
        sizes = sizes_of(
            [[of_client[at] for at in some] for of_client, some in zip(prompts, alike, strict=True)]
        )
        for places in in_turn(sizes, scoring.batch_size):
            batch = [(client, [alike[client][at] for at in texts]) for client, texts in places]
            asked = _padded(base, [prompts[client][at] for client, texts in batch for at in texts])
            for owners, rows in _continued(group, batch, shares, asked, scoring, kind.new_tokens):
                for (client, at), text in zip(owners, _texts(base, rows), strict=True):
                    answers[client][at] = text
    return answers


class _Kind(NamedTuple):
    """Which prompts may be continued together: those with as much room, and perhaps as long."""

    new_tokens: int
    length: int


def _kind(base: Base, prompt: Ids, scoring: Scoring) -> _Kind:
    """Mostly all prompts are of one kind: answers fit, and the model bears padding before them."""
    length = 0 if base.bears_padding_before else len(prompt)
    return _Kind(longest_answer(base, prompt, scoring), length)


def _padded(base: Base, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (prompts, tokens): every prompt ends where its answer begins."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), base.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(base.adapted.device), mask.to(base.adapted.device)


def _texts(base: Base, rows: Tensor) -> list[str]:
    """What a reader sees of written ids."""
    tokens = [without_end(row, base.tokenizer, ends(base)) for row in rows.tolist()]
    decoded = base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [str(text).strip() for text in decoded]


def _continued(
    group: Group,
    batch: Sequence[Share],
    shares: Shares | None,
    prompts: tuple[Tensor, Tensor],
    scoring: Scoring,
    new_tokens: int,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """What follows padded prompts, ids and mask, of a batch: whose, and (rows, tokens), in parts.

    Greedy answers leave the batch as soon as it is half done: one that does not end would have
    all others wait for it.
    """
    ids, mask = prompts
    last = torch.tensor(ends(group.base), dtype=torch.long, device=ids.device)
    whole_width, width = ids.shape[1] + new_tokens, ids.shape[1]
    greedy = scoring.beams == 1

    def ended(ids: Tensor) -> Tensor:
        whole = ids.shape[1] >= whole_width
        return torch.isin(ids[:, width:], last).any(1) | whole

    def half_ended(ids: Tensor, *_: object, **__: object) -> Tensor:
        done = ended(ids)
        return done | (2 * done.sum() >= len(done))

    known: dict[str, Any] = {"stopping_criteria": [half_ended]} if greedy else {}
    cache = cache_for(group.base.adapted.model, whole_width)
    if cache is not None:
        known["past_key_values"] = cache
    while batch:
        config = greedily(group.base, scoring, whole_width - ids.shape[1])
        rows = len(ids) * scoring.beams
        with (
            within_memory(rows, rows * whole_width),
            group.bound(batch, shares) as model,
            without_card(model),
        ):
            if cache is not None and not greedy:
                _read_once(model, ids, mask, cache, scoring.beams)
            out: Any = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, **known
            )
        written: Tensor = out.sequences
        done = ended(written) if greedy else torch.ones_like(written[:, 0], dtype=torch.bool)
        places = [(client, at) for client, texts in batch for at in texts]
        leave, stay = done.nonzero()[:, 0], (~done).nonzero()[:, 0]
        yield [places[row] for row in leave.tolist()], written[leave, width:]
        going = {places[row] for row in stay.tolist()}
        shared = [
            (client, [at for at in texts if (client, at) in going]) for client, texts in batch
        ]
        batch = [share for share in shared if share[1]]
        if batch:
            # Without a cache, or with one that cannot be cut, the model reads it all once more.
            if can_select(out.past_key_values):
                out.past_key_values.batch_select_indices(stay)
                known["past_key_values"] = out.past_key_values
            mask = functional.pad(mask[stay], (0, written.shape[1] - ids.shape[1]), value=1)
            ids = written[stay]


def _read_once(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache, beams: int) -> None:
    """Read prompts before they are repeated for every beam, all but the last token."""
    if ids.shape[1] == 1:
        return
    known = {}
    if "position_ids" in signature(model.base_model.forward).parameters:
        known["position_ids"] = (mask[:, :-1].cumsum(1) - 1).clamp(min=0)
    model.base_model(
        ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True, **known
    )
    cache.batch_repeat_interleave(beams)
