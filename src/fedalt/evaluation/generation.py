"""Answers written by several clients' models at once."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from fedalt.evaluation.cache import cache_for, can_select
from fedalt.evaluation.group import Group, Ids, Share, Shares, shares_of, sizes_of
from fedalt.evaluation.scores import Scoring
from fedalt.methods.contract import Serving
from fedalt.models import Base
from fedalt.training.batches import in_turn


@torch.no_grad()
def generate(
    base: Base, serving: Serving | None, prompts: Sequence[Ids], scoring: Scoring
) -> list[str]:
    """Write an answer to every prompt: greedy or beam search, never sampled.

    Without a serving the base model answers as it is.
    """
    group = Group(base, [] if serving is None else [serving])
    return written(group, [prompts], shares_of(group, [prompts], scoring.batch_size), scoring)[0]


def written(
    group: Group, prompts: Sequence[Sequence[Ids]], shares: Shares | None, scoring: Scoring
) -> list[list[str]]:
    """An answer to every prompt of every client."""
    base = group.base
    found = [[""] * len(each) for each in prompts]
    for batch in _batches(base, prompts, scoring.batch_size):
        chosen = [(client, at) for client, texts in batch for at in texts]
        width = max(len(prompts[client][at]) for client, at in chosen)
        # Padded on the left, so that every prompt ends where its answer begins.
        ids = torch.full((len(chosen), width), base.pad_id)
        mask = torch.zeros_like(ids)
        for row, (client, at) in enumerate(chosen):
            prompt = prompts[client][at]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = base.adapted.device
        for places, written in _continued(group, batch, shares, (ids.to(device), mask), scoring):
            decoded = base.tokenizer.batch_decode(written, skip_special_tokens=True)
            for (client, at), text in zip(places, decoded, strict=True):
                found[client][at] = text.strip()
    return found


def _batches(
    base: Base, prompts: Sequence[Sequence[Ids]], batch_size: int
) -> Iterator[list[Share]]:
    """Which prompts are continued together: of any lengths, where the model bears padding."""
    for batch in in_turn(sizes_of(prompts), batch_size):
        if base.bears_padding_before:
            yield list(batch)
            continue
        for length in sorted({len(prompts[client][at]) for client, of in batch for at in of}):
            alike = [
                (client, [at for at in of if len(prompts[client][at]) == length])
                for client, of in batch
            ]
            yield [share for share in alike if share[1]]


def _continued(
    group: Group,
    batch: Sequence[Share],
    shares: Shares | None,
    prompts: tuple[Tensor, Tensor],
    scoring: Scoring,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """What follows padded prompts, ids and mask, of a batch: whose, and (rows, tokens), in parts.

    Greedy answers leave the batch as soon as it is half done: one that does not end would have
    all others wait for it.
    """
    (ids, mask), end = prompts, group.base.tokenizer.eos_token_id
    width = ids.shape[1]
    greedy = scoring.beams == 1

    def ended(ids: Tensor) -> Tensor:
        whole = ids.shape[1] >= width + scoring.max_new_tokens
        return torch.eq(ids[:, width:], end).any(1) | whole

    def half_ended(ids: Tensor, *_: object, **__: object) -> Tensor:
        done = ended(ids)
        return done | (2 * done.sum() >= len(done))

    known: dict[str, Any] = {"stopping_criteria": [half_ended]} if greedy else {}
    cache = cache_for(group.base.adapted.model, width + scoring.max_new_tokens)
    if cache is not None:
        known["past_key_values"] = cache
    while batch:
        config = GenerationConfig(
            max_new_tokens=width + scoring.max_new_tokens - ids.shape[1],
            num_beams=scoring.beams,
            do_sample=False,
            pad_token_id=group.base.pad_id,
            eos_token_id=end,
            return_dict_in_generate=True,
            use_cache=True,
        )
        with group.bound(batch, shares) as model:
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
