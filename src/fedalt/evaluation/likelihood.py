"""Losses of answers, likelihoods of options and labels, of several clients at once."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from math import nan
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional

from fedalt.adapters.binding import Watch
from fedalt.core.settings import Scoring
from fedalt.data.answers import encode_answer
from fedalt.data.examples import Example
from fedalt.evaluation.gate_statistics import Tally, Weighing
from fedalt.evaluation.group import Group, Shares, within_memory
from fedalt.models.base import Base
from fedalt.training.batches import answers_in_one, collate, in_turn
from fedalt.training.group import packs
from fedalt.training.loop import usual_tokens
from fedalt.training.loss import label_logits, token_losses

Questions = Sequence[Sequence[Example]]  # with each of the answers to choose from, the right first


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and what there is to tell of each example, in the order of the examples.

    `loss`: mean over all answer tokens, nats. `accuracy` in [0, 1]: share of examples whose right
    option is the likeliest of its options, counted over those that list their answer.
    `predictions` are generated texts, or the names of a classifier's labels; `losses` means over
    each example's answer tokens. `weighing` is what a mixer or router did, if that was watched
    where all tokens are seen.
    """

    metrics: dict[str, float]
    predictions: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    weighing: Weighing | None = None


@dataclass(frozen=True)
class _Text:
    """Answers to a question that go through the model together; `rows` number them all.

    Packed, these are all of its answers behind one prompt, else one of them. `right`: whether the
    first of them is the right one.
    """

    question: int
    answers: Sequence[Example]
    rows: range
    right: bool

    @property
    def tokens(self) -> int:
        """How many stand in a packed row."""
        before = self.answers[0].answer_start
        return before + sum(max(len(each.ids) - before - 1, 0) for each in self.answers)


def can_pack(base: Base, questions: Questions) -> bool:
    """Whether these can stand in one row, a prompt but once for all answers behind it."""
    return all(
        each.answer_start > 0 and packs(base, [each]) for asked in questions for each in asked
    )


def questions_of(base: Base, examples: Sequence[Example]) -> Questions:
    """Each example, and behind it one for each wrong option.

    The loss is on what would be trained, so for training examples on earlier answers as well; where
    there are options to choose from, on the last answer alone.
    """
    scored = [replace(each, earlier=()) if each.options else each for each in examples]
    return [[example, *_wrong_options(base, example)] for example in scored]


def _wrong_options(base: Base, example: Example) -> Iterator[Example]:
    """The question with each of the answers that it offers but for the right one."""
    if example.label is None and example.answer in example.options:
        known: Sequence[tuple[int, ...] | None] = example.option_ids
        known = known or [None] * len(example.options)
        for option, ids in zip(example.options, known, strict=True):
            if option != example.answer:
                behind = encode_answer(option, base.tokenizer) if ids is None else ids
                yield replace(example, ids=(*example.prompt_ids, *behind), answer=option)


def likelihoods(
    group: Group,
    questions: Sequence[Questions],
    shares: Shares | None,
    scoring: Scoring,
    tally: Tally | None,
) -> list[Scores]:
    """Answer loss, and accuracy over options; the right option is computed once for both.

    Where an option's loss is no finite number, the client's loss is NaN and it has no accuracy.
    """
    sums, counts = _sums(group, questions, shares, scoring.batch_size, tally)
    weighed = sums / counts.clamp(min=1) if scoring.options == "mean" else sums
    scores, before = [], 0
    for asked in questions:
        firsts = [before, *accumulate((len(question) for question in asked), initial=before)][1:-1]
        metrics = {"loss": float(sums[firsts].sum() / counts[firsts].sum().clamp(min=1))}
        right = [
            _is_right(question, weighed[first : first + len(question)])
            for first, question in zip(firsts, asked, strict=True)
            if question[0].answer in question[0].options
        ]
        if not sums[before : before + sum(map(len, asked))].isfinite().all():
            metrics["loss"] = nan
        elif right:
            metrics["accuracy"] = sum(right) / len(right)
        losses = (sums[firsts] / counts[firsts].clamp(min=1)).tolist()
        scores.append(Scores(metrics, losses=tuple(losses)))
        before += sum(map(len, asked))
    return scores


def _is_right(answers: Sequence[Example], losses: Tensor) -> bool:
    """Whether the first is the likeliest; never where the tokenizer makes another one the same."""
    twice = any(each.ids == answers[0].ids for each in answers[1:])
    return int(losses.argmin()) == 0 and not twice


def _sums(
    group: Group,
    questions: Sequence[Questions],
    shares: Shares | None,
    batch_size: int,
    tally: Tally | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of answer losses and number of answer tokens, float64, of every answer in turn."""
    base, device = group.base, group.base.adapted.device
    pack = all(can_pack(base, asked) for asked in questions)
    texts = _texts(questions, pack=pack)
    if shares is not None:
        shares = [
            weights[[text.question for text in own]]
            for weights, own in zip(shares, texts, strict=True)
        ]
    sums = torch.zeros(sum(len(text.answers) for own in texts for text in own)).double()
    counts = torch.zeros_like(sums)
    sizes = [[max(len(answer.ids) for answer in text.answers) for text in own] for own in texts]
    # Answers are written a token at a time, which wants many rows; likelihoods fill a pass at once.
    for batch in in_turn(sizes, batch_size, usual_tokens(base)):
        chosen = [[texts[client][at] for at in own] for client, own in batch]
        rows = [row for own in chosen for text in own for row in text.rows]
        answers = [text.answers for own in chosen for text in own]
        if pack:
            whole = answers_in_one([[text.answers for text in own] for own in chosen], device)
        else:
            whole = collate(answers, base.pad_id, device)
        wide = [text.tokens if pack else whole.ids.shape[1] for own in chosen for text in own]
        starts = accumulate(wide[:-1], initial=0)
        owners = [client for client, own in batch for _ in own]
        seen = [
            (client, range(start, start + len(text.answers[0].ids) - 1))
            for client, text, start in zip(owners, chain(*chosen), starts, strict=True)
            if tally is not None and text.right and text.question < tally.examples
        ]
        with (
            within_memory(len(rows), whole.ids.numel()),
            _watching(tally, seen, whole.ids.numel()) as watch,
            group.bound(batch, shares, packing=whole.packing, watch=watch) as model,
        ):
            losses = token_losses(model, whole).double()
        zeros = losses.new_zeros(len(rows))
        sums[rows] = zeros.index_add(0, whole.owners, losses).cpu()
        counts[rows] = zeros.index_add(0, whole.owners, torch.ones_like(losses)).cpu()
    return sums, counts


def _texts(questions: Sequence[Questions], *, pack: bool) -> list[list[_Text]]:
    """What goes through the model for each client's questions."""
    texts: list[list[_Text]] = []
    row = 0
    for asked in questions:
        texts.append([])
        for number, answers in enumerate(asked):
            for first, together in enumerate([answers] if pack else [[each] for each in answers]):
                rows = range(row, row := row + len(together))
                texts[-1].append(_Text(number, together, rows, first == 0))
    return texts


def _watching(
    tally: Tally | None, seen: Sequence[tuple[int, range]], tokens: int
) -> AbstractContextManager[Watch | None]:
    """Counts the weights of some of a pass's tokens, each for its client, if that is wanted."""
    if tally is None or not any(where for _, where in seen):
        return nullcontext()
    return tally.counting(seen, tokens)


def classified(
    group: Group,
    examples: Sequence[Sequence[Example]],
    shares: Shares | None,
    batch_size: int,
    tally: Tally | None,
) -> list[Scores]:
    """Loss, accuracy, and the names of the likeliest labels."""
    losses = [torch.zeros(len(own)) for own in examples]
    guesses = [torch.zeros(len(own), dtype=torch.long) for own in examples]
    for batch in in_turn([[len(example.ids) for example in of] for of in examples], batch_size):
        chosen = [(client, at) for client, texts in batch for at in texts]
        rows = [examples[client][at] for client, at in chosen]
        whole = collate([rows], group.base.pad_id, group.base.adapted.device)
        starts = range(0, whole.ids.numel(), whole.ids.shape[1])
        seen = [
            (client, range(start, start + len(examples[client][at].ids)))
            for (client, at), start in zip(chosen, starts, strict=True)
            if tally is not None and at < tally.examples
        ]
        with (
            within_memory(len(rows), whole.ids.numel()),
            _watching(tally, seen, whole.ids.numel()) as watch,
            group.bound(batch, shares, watch=watch) as model,
        ):
            logits = label_logits(model, whole).float()
        row_losses = functional.cross_entropy(logits, whole.targets, reduction="none").cpu()
        likeliest = logits.argmax(-1).cpu()
        for row, (client, at) in enumerate(chosen):
            losses[client][at], guesses[client][at] = row_losses[row], likeliest[row]
    return [
        Scores(
            {
                "loss": float(loss.mean()),
                "accuracy": fmean(
                    int(g) == example.label for g, example in zip(guess, of, strict=True)
                ),
            },
            tuple(example.options[int(g)] for g, example in zip(guess, of, strict=True)),
            tuple(loss.tolist()),
        )
        for loss, guess, of in zip(losses, guesses, examples, strict=True)
    ]
