"""What servings are worth on clients' examples: answer loss, accuracy, generated text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import torch

from fedalt.core.settings import Scoring
from fedalt.data.examples import Example
from fedalt.evaluation.asking import fitted
from fedalt.evaluation.gate_statistics import Tally
from fedalt.evaluation.generation import written
from fedalt.evaluation.group import Group, shares_of
from fedalt.evaluation.likelihood import (
    Questions,
    Scores,
    can_pack,
    classified,
    likelihoods,
    questions_of,
)
from fedalt.methods.contract import Serving
from fedalt.metrics import text_metrics
from fedalt.models.base import Base

# Clients are scored together until they fill so many batches: what the last one leaves empty then
# counts little. Only so many, because their trees are in memory at once.
_BATCHES: Final = 2
_MOST_CLIENTS: Final = 16

Id = TypeVar("Id")


def score(base: Base, serving: Serving, examples: Sequence[Example], scoring: Scoring) -> Scores:
    """Score one client's serving."""
    return score_together(base, [(serving, examples)], scoring)[0]


@torch.no_grad()
def score_together(
    base: Base,
    clients: Sequence[tuple[Serving, Sequence[Example]]],
    scoring: Scoring,
    *,
    watch: int = 0,
) -> list[Scores]:
    """Score several clients' servings, in shared passes where plans and shapes agree.

    A batch has as many examples as one client's would have, so that memory does not grow with it;
    what does are the trees, which are all given at once. With `watch` the weights that a mixer or
    router gives to each client's first so many examples are told, too.
    """
    by_client: dict[int, Scores] = {}
    servings = [serving for serving, _ in clients]
    questions = [questions_of(base, examples) for _, examples in clients]
    for members in _alike(base, servings, questions):
        group = Group(base, [servings[at] for at in members])
        scores = _scores(group, [questions[at] for at in members], scoring, watch)
        by_client |= zip(members, scores, strict=True)
    return [by_client.get(at, Scores({})) for at in range(len(clients))]


def in_groups(
    clients: Iterable[tuple[Id, Sequence[Example]]], scoring: Scoring
) -> Iterator[list[tuple[Id, Sequence[Example]]]]:
    """Clients with examples, so many at a time that it is worth it and memory stays bounded."""
    group: list[tuple[Id, Sequence[Example]]] = []
    for client_id, examples in clients:
        if examples:
            group.append((client_id, examples))
        enough = sum(len(texts) for _, texts in group) >= _BATCHES * scoring.batch_size
        if enough or len(group) == _MOST_CLIENTS:
            yield group
            group = []
    if group:
        yield group


def _alike(
    base: Base, servings: Sequence[Serving], questions: Sequence[Questions]
) -> Iterator[list[int]]:
    """Clients with examples, in groups that can share their passes through the base model."""
    groups: dict[object, list[int]] = {}
    for at, (serving, asked) in enumerate(zip(servings, questions, strict=True)):
        if asked:
            shapes = {name: tuple(tensor.shape) for name, tensor in serving.tree.items()}
            apart = None if base.adapted.shares_passes else at
            key = serving.plan, frozenset(shapes.items()), can_pack(base, asked), apart
            groups.setdefault(key, []).append(at)
    yield from groups.values()


def _scores(
    group: Group, questions: Sequence[Questions], scoring: Scoring, watch: int
) -> list[Scores]:
    """The scores of each client of a group."""
    examples = [[asked[0] for asked in of_client] for of_client in questions]
    prompts = [[example.prompt_ids for example in of_client] for of_client in examples]
    shares = shares_of(group, prompts, scoring.batch_size)
    weighs = watch and group.plan.gate is not None
    tally = Tally(group.plan, len(examples), watch) if weighs else None
    classifies = examples[0][0].label is not None
    if classifies:
        results = classified(group, examples, shares, scoring.batch_size, tally)
    else:
        results = likelihoods(group, questions, shares, scoring, tally)
    if tally is not None:
        results = [replace(scores, weighing=tally.of(at)) for at, scores in enumerate(results)]
    if classifies or not scoring.generate:
        return results
    asked = [[fitted(group.base, prompt, scoring) for prompt in of_client] for of_client in prompts]
    if asked != prompts:
        shares = shares_of(group, asked, scoring.batch_size)
    texts_of = written(group, asked, shares, scoring)
    return [
        replace(
            scores,
            metrics=scores.metrics | text_metrics(texts, [example.answer for example in of_client]),
            predictions=tuple(texts),
        )
        for scores, texts, of_client in zip(results, texts_of, examples, strict=True)
    ]
