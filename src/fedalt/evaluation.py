"""What a serving is worth on a client's examples: answer loss, accuracy, generated text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from fedalt import tree as trees
from fedalt.adapters.plan import HEAD, Plan, Similarity, single
from fedalt.data.examples import Example
from fedalt.data.prompts import encode_answer
from fedalt.methods.contract import Serving
from fedalt.metrics import text_metrics
from fedalt.models import Base
from fedalt.training.batches import Batch, answers_in_one, by_length, collate
from fedalt.training.group import TrainingError, out_of_memory, packs
from fedalt.training.loss import token_losses
from fedalt.tree import Tree

Shares = Callable[[Sequence[int]], Tensor | None]  # for the examples at these indices


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How test and validation examples are scored.

    `generate`: also write answers, for exact match and ROUGE, with `beams` beams (1 is greedy) and
    at most `max_new_tokens` tokens each.
    """

    batch_size: int = 32
    generate: bool = True
    beams: int = 1
    max_new_tokens: int = 80

    def __post_init__(self) -> None:
        for name in ("batch_size", "beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but it is at least 1")


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and the generated texts in the order of the examples.

    `loss`: mean over all answer tokens, nats. `accuracy` in [0, 1]: share of examples whose right
    option is the likeliest of its options, counted over those that list their answer.
    """

    metrics: dict[str, float]
    predictions: tuple[str, ...] = ()


@torch.no_grad()
def score(base: Base, serving: Serving, examples: Sequence[Example], scoring: Scoring) -> Scores:
    """Score one client's serving."""
    if not examples:
        return Scores({})
    metrics = _likelihoods(base, serving, examples, scoring.batch_size)
    if not scoring.generate or examples[0].label is not None:
        return Scores(metrics)
    predictions = generate(base, serving, [example.prompt_ids for example in examples], scoring)
    metrics |= text_metrics(predictions, [example.answer for example in examples])
    return Scores(metrics, tuple(predictions))


@torch.no_grad()
def embed(
    base: Base, plan: Plan, tree: Tree, prompts: Sequence[Sequence[int]], batch_size: int
) -> Tensor:
    """The last hidden state at each prompt's last token: (prompts, hidden), float32, on the CPU."""
    found: list[Tensor] = []
    tree = trees.on(tree, base.adapted.device)
    for first in range(0, len(prompts), batch_size):
        chosen = [
            Example(tuple(ids), len(ids), "", label=0) for ids in prompts[first:][:batch_size]
        ]
        batch = collate([chosen], base.pad_id, base.adapted.device)
        with base.adapted.bound(plan, tree) as model:
            hidden = model.base_model(batch.ids, attention_mask=batch.mask).last_hidden_state
        last = torch.tensor([len(example.ids) - 1 for example in chosen])
        found.append(hidden[torch.arange(len(chosen)), last].float().cpu())
    return torch.cat(found)


def _shares(base: Base, serving: Serving, prompts: Sequence[Sequence[int]], size: int) -> Shares:
    """The weights of the slots for each prompt, where the serving's plan wants them."""
    combine = serving.plan.combine
    if not isinstance(combine, Similarity):
        return lambda _: None
    assert serving.references is not None
    slot = serving.plan.slots[combine.embeds]
    tree = trees.select(serving.tree, slot.name, HEAD)
    # The options of a question share its prompt.
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    seen = functional.normalize(embed(base, single(slot), tree, list(rows), size), dim=-1)
    likeness = (seen @ functional.normalize(serving.references.float(), dim=-1).T).mean(1)
    like = likeness[[rows[tuple(prompt)] for prompt in prompts]]
    weights = torch.zeros(len(prompts), 2)
    weights[:, combine.on] = combine.scale * like
    weights[:, 1 - combine.on] = 1 - combine.scale * like
    return lambda rows: weights[list(rows)].to(base.adapted.device)


@torch.no_grad()
def generate(
    base: Base, serving: Serving, prompts: Sequence[Sequence[int]], scoring: Scoring
) -> list[str]:
    """Write an answer to every prompt: greedy or beam search, never sampled."""
    pad = base.pad_id
    config = GenerationConfig(
        max_new_tokens=scoring.max_new_tokens,
        num_beams=scoring.beams,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=base.tokenizer.eos_token_id,
    )
    device = base.adapted.device
    tree = trees.on(serving.tree, device)
    texts = [""] * len(prompts)
    shares = _shares(base, serving, prompts, scoring.batch_size)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for first in range(0, len(order), scoring.batch_size):
        rows = order[first : first + scoring.batch_size]
        width = len(prompts[rows[0]])
        # Padded on the left, so that every prompt ends where its answer begins.
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(rows):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with base.adapted.bound(serving.plan, tree, shares=shares(rows)) as model:
            written = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        decoded = base.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        for index, text in zip(rows, decoded, strict=True):
            texts[index] = text.strip()
    return texts


def _likelihoods(
    base: Base, serving: Serving, examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """Answer loss, and accuracy over options; the right option is computed once for both."""
    if examples[0].label is not None:
        return _classification(base, serving, examples, batch_size)
    questions = [[example, *_wrong_options(base, example)] for example in examples]
    sums, counts = _sums(base, serving, questions, batch_size)
    firsts = [0, *accumulate(len(question) for question in questions)][:-1]
    metrics = {"loss": float(sums[firsts].sum() / counts[firsts].sum().clamp(min=1))}
    right = [
        int(sums[first : first + len(question)].argmin()) == 0
        for first, question in zip(firsts, questions, strict=True)
        if question[0].answer in question[0].options
    ]
    if right:
        metrics["accuracy"] = sum(right) / len(right)
    return metrics


def _wrong_options(base: Base, example: Example) -> Iterator[Example]:
    """The question with each of the answers that it offers but for the right one."""
    if example.answer in example.options:
        for option in example.options:
            if option != example.answer:
                ids = (*example.prompt_ids, *encode_answer(option, base.tokenizer))
                yield replace(example, ids=ids, answer=option)


def _sums(
    base: Base, serving: Serving, questions: Sequence[Sequence[Example]], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Sum of answer losses and number of answer tokens, float64, of every answer in turn."""
    answers = [answer for question in questions for answer in question]
    sums = torch.zeros(len(answers), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    tree = trees.on(serving.tree, base.adapted.device)
    prompts = [answer.prompt_ids for answer in answers]
    shares = _shares(base, serving, prompts, batch_size)
    for rows, batch, weighed in _passes(base, questions, batch_size):
        labelled, weights = batch.labelled(1), shares(weighed)
        with base.adapted.bound(
            serving.plan, tree, shares=weights, packing=batch.packing, labelled=labelled
        ) as model:
            try:
                losses = token_losses(model, batch).double()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise TrainingError(
                    f"out of memory while scoring {len(rows)} texts, {batch.ids.numel()} tokens "
                    "at once; lower --eval-batch-size or --max-length"
                ) from error
        owners = batch.owners
        zeros = losses.new_zeros(len(rows))
        sums[rows] = zeros.index_add(0, owners, losses).cpu()
        counts[rows] = zeros.index_add(0, owners, torch.ones_like(losses)).cpu()
    return sums, counts


def _passes(
    base: Base, questions: Sequence[Sequence[Example]], batch_size: int
) -> Iterator[tuple[list[int], Batch, list[int]]]:
    """Batches, which of all answers are in each, and whose prompt stands in each of its rows.

    A packed batch is one row: there, it is whose prompt each token belongs to. Each answer is its
    own owner.
    """
    device = base.adapted.device
    firsts = [0, *accumulate(len(question) for question in questions)]
    longest = [max(question, key=lambda each: len(each.ids)) for question in questions]
    if all(each.answer_start > 0 and packs(base, [each]) for each in longest):
        for chosen in by_length(longest, batch_size):
            rows = [row for at in chosen for row in range(firsts[at], firsts[at + 1])]
            batch = answers_in_one([questions[at] for at in chosen], device)
            assert batch.packing is not None
            text_of = (batch.packing.positions[0] == 0).cumsum(0) - 1
            yield rows, batch, [firsts[chosen[text]] for text in text_of.tolist()]
        return
    answers = [answer for question in questions for answer in question]
    for rows in by_length(answers, batch_size):
        yield rows, collate([[answers[row]] for row in rows], base.pad_id, device), rows


def _classification(
    base: Base, serving: Serving, examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    losses, right = 0.0, 0
    tree = trees.on(serving.tree, base.adapted.device)
    prompts = [example.prompt_ids for example in examples]
    shares = _shares(base, serving, prompts, batch_size)
    for rows in by_length(examples, batch_size):
        batch = collate([[examples[row] for row in rows]], base.pad_id, base.adapted.device)
        with base.adapted.bound(serving.plan, tree, shares=shares(rows)) as model:
            logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits.float()
        losses += float(functional.cross_entropy(logits, batch.targets, reduction="sum"))
        right += int((logits.argmax(-1) == batch.targets).sum())
    return {"loss": losses / len(examples), "accuracy": right / len(examples)}
