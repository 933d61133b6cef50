"""What a serving is worth on a client's examples: answer loss, accuracy, generated text."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, chain, count
from statistics import fmean
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel

from fedalt import tree as trees
from fedalt.adapters.layer import Watch
from fedalt.adapters.packing import Packing
from fedalt.adapters.plan import HEAD, Plan, Similarity, single
from fedalt.adapters.pruning import Labelled
from fedalt.data.examples import Example
from fedalt.data.prompts import encode_answer
from fedalt.methods.contract import Serving
from fedalt.metrics import text_metrics
from fedalt.models import Base
from fedalt.training.batches import answers_in_one, collate, in_turn
from fedalt.training.group import TrainingError, out_of_memory, packs
from fedalt.training.loop import usual_tokens
from fedalt.training.loss import token_losses
from fedalt.tree import Tree
from fedalt.weighing import Tally, Watched, Weighing

# Clients are scored together until they fill so many batches: what the last one leaves empty then
# counts little. Only so many, because their trees are in memory at once.
_BATCHES: Final = 4
_MOST_CLIENTS: Final = 16

Id = TypeVar("Id")
Ids = Sequence[int]
Share = tuple[int, list[int]]  # a client, and which of its texts


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
    """Metrics by name, and what there is to tell of each example, in the order of the examples.

    `loss`: mean over all answer tokens, nats. `accuracy` in [0, 1]: share of examples whose right
    option is the likeliest of its options, counted over those that list their answer.
    `predictions` are generated texts, or the names of a classifier's labels; `losses` means over
    each example's answer tokens. `weighing` is what a mixer or router did, if that was watched.
    """

    metrics: dict[str, float]
    predictions: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    weighing: Weighing | None = None


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
    found: dict[int, Scores] = {}
    servings = [serving for serving, _ in clients]
    questions = [_questions(base, examples) for _, examples in clients]
    for members in _alike(base, servings, questions):
        group = _Group(base, [servings[at] for at in members])
        scores = _scores(group, [questions[at] for at in members], scoring, watch)
        found |= zip(members, scores, strict=True)
    return [found.get(at, Scores({})) for at in range(len(clients))]


def in_groups(
    clients: Iterable[tuple[Id, Sequence[Example]]], scoring: Scoring
) -> Iterator[list[tuple[Id, Sequence[Example]]]]:
    """Clients with examples, so many at a time that it is worth it and memory stays bounded."""
    group: list[tuple[Id, Sequence[Example]]] = []
    for client_id, examples in clients:
        if examples:
            group.append((client_id, examples))
        enough = sum(len(each) for _, each in group) >= _BATCHES * scoring.batch_size
        if enough or len(group) == _MOST_CLIENTS:
            yield group
            group = []
    if group:
        yield group


@torch.no_grad()
def generate(
    base: Base, serving: Serving | None, prompts: Sequence[Ids], scoring: Scoring
) -> list[str]:
    """Write an answer to every prompt: greedy or beam search, never sampled.

    Without a serving the base model answers as it is.
    """
    group = _Group(base, [] if serving is None else [serving])
    return _write(group, [prompts], _shares(group, [prompts], scoring.batch_size), scoring)[0]


@torch.no_grad()
def embed(base: Base, plan: Plan, tree: Tree, prompts: Sequence[Ids], batch_size: int) -> Tensor:
    """The last hidden state at each prompt's last token: (prompts, hidden), float32, on the CPU."""
    return _embed(_Group(base, [Serving(plan, tree)]), [prompts], batch_size)[0]


@dataclass(frozen=True)
class _Group:
    """Servings that agree in plan and shapes; none where the base model stands for itself."""

    base: Base
    servings: Sequence[Serving]

    @property
    def plan(self) -> Plan:
        return self.servings[0].plan

    @contextmanager
    def bound(
        self,
        batch: Sequence[Share],
        shares: "_Shares | None" = None,
        *,
        packing: Packing | None = None,
        labelled: Labelled | None = None,
        watch: Watch | None = None,
    ) -> Iterator[PreTrainedModel]:
        """The model bound to the clients of a batch, whose texts stand client by client."""
        if not self.servings:
            yield self.base.adapted.model
            return
        each = [self.servings[client].tree for client, _ in batch]
        # One client's tree is bound as it is, without a copy.
        tree = each[0] if len(each) == 1 else trees.apply(lambda *all_: torch.stack(all_), *each)
        device = self.base.adapted.device
        weights = None
        if shares is not None:
            weights = torch.cat([shares[client][chosen] for client, chosen in batch])
            if packing is not None:
                weights = weights[_text_of_tokens(packing)]
            weights = weights.to(device)
        with self.base.adapted.bound(
            self.plan,
            trees.on(tree, device),
            shares=weights,
            packing=packing,
            labelled=labelled,
            rows=None if packing is not None else [len(chosen) for _, chosen in batch],
            watch=watch,
        ) as model:
            yield model


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


_Shares = Sequence[Tensor]  # of each client: (texts, slots), the weights of the slots
_Questions = Sequence[Sequence[Example]]  # with each of the answers to choose from, the right first


def _alike(
    base: Base, servings: Sequence[Serving], questions: Sequence[_Questions]
) -> Iterator[list[int]]:
    """Clients with examples, in groups that can share their passes through the base model."""
    groups: dict[object, list[int]] = {}
    for at, (serving, asked) in enumerate(zip(servings, questions, strict=True)):
        if asked:
            shapes = {name: tuple(tensor.shape) for name, tensor in serving.tree.items()}
            key = serving.plan, frozenset(shapes.items()), _pack(base, asked)
            groups.setdefault(key, []).append(at)
    yield from groups.values()


def _pack(base: Base, questions: _Questions) -> bool:
    """Whether these can stand in one row, a prompt but once for all answers behind it."""
    return all(
        each.answer_start > 0 and packs(base, [each]) for asked in questions for each in asked
    )


def _questions(base: Base, examples: Sequence[Example]) -> _Questions:
    return [[example, *_wrong_options(base, example)] for example in examples]


def _wrong_options(base: Base, example: Example) -> Iterator[Example]:
    """The question with each of the answers that it offers but for the right one."""
    if example.label is None and example.answer in example.options:
        for option in example.options:
            if option != example.answer:
                ids = (*example.prompt_ids, *encode_answer(option, base.tokenizer))
                yield replace(example, ids=ids, answer=option)


def _scores(
    group: _Group, questions: Sequence[_Questions], scoring: Scoring, watch: int
) -> list[Scores]:
    """The scores of each client of a group."""
    examples = [[asked[0] for asked in each] for each in questions]
    prompts = [[example.prompt_ids for example in each] for each in examples]
    shares = _shares(group, prompts, scoring.batch_size)
    tally = Tally(group.plan, len(examples)) if watch and group.plan.gate is not None else None
    watched = None if tally is None else Watched(tally, watch)
    classifies = examples[0][0].label is not None
    if classifies:
        found = _classified(group, examples, shares, scoring.batch_size, watched)
    else:
        found = _likelihoods(group, questions, shares, scoring.batch_size, watched)
    if tally is not None:
        found = [replace(each, weighing=tally.of(at)) for at, each in enumerate(found)]
    if classifies or not scoring.generate:
        return found
    written = _write(group, prompts, shares, scoring)
    return [
        replace(
            scores,
            metrics=scores.metrics | text_metrics(texts, [example.answer for example in each]),
            predictions=tuple(texts),
        )
        for scores, texts, each in zip(found, written, examples, strict=True)
    ]


def _embed(group: _Group, prompts: Sequence[Sequence[Ids]], batch_size: int) -> list[Tensor]:
    """The last hidden state at each client's prompts' last tokens, on the CPU."""
    found: list[dict[int, Tensor]] = [{} for _ in prompts]
    for batch in in_turn(_sizes(prompts), batch_size):
        chosen = [tuple(prompts[client][at]) for client, texts in batch for at in texts]
        examples = [Example(ids, len(ids), "", label=0) for ids in chosen]
        padded = collate([examples], group.base.pad_id, group.base.adapted.device)
        with group.bound(batch) as model:
            hidden = model.base_model(padded.ids, attention_mask=padded.mask).last_hidden_state
        last = torch.tensor([len(ids) - 1 for ids in chosen])
        rows = iter(hidden[torch.arange(len(chosen)), last].float().cpu())
        for client, texts in batch:
            found[client] |= zip(texts, rows, strict=False)
    return [torch.stack([each[at] for at in range(len(each))]) for each in found]


def _shares(group: _Group, prompts: Sequence[Sequence[Ids]], size: int) -> _Shares | None:
    """The weights of the slots for each prompt, where the plan wants them."""
    combine = group.plan.combine if group.servings else None
    if not isinstance(combine, Similarity):
        return None
    slot = group.plan.slots[combine.embeds]
    alone = [
        Serving(single(slot), trees.select(each.tree, slot.name, HEAD)) for each in group.servings
    ]
    found = []
    embedded = _embed(_Group(group.base, alone), prompts, size)
    for serving, seen in zip(group.servings, embedded, strict=True):
        assert serving.references is not None
        known = functional.normalize(serving.references.float(), dim=-1)
        likeness = (functional.normalize(seen, dim=-1) @ known.T).mean(1)
        weights = torch.zeros(len(seen), 2)
        weights[:, combine.on] = combine.scale * likeness
        weights[:, 1 - combine.on] = 1 - combine.scale * likeness
        found.append(weights)
    return found


def _write(
    group: _Group, prompts: Sequence[Sequence[Ids]], shares: _Shares | None, scoring: Scoring
) -> list[list[str]]:
    """An answer to every prompt of every client."""
    base = group.base
    found = [[""] * len(each) for each in prompts]
    for batch in in_turn(_sizes(prompts), scoring.batch_size):
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


def _continued(
    group: _Group,
    batch: Sequence[Share],
    shares: _Shares | None,
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
    while batch:
        config = GenerationConfig(
            max_new_tokens=width + scoring.max_new_tokens - ids.shape[1],
            num_beams=scoring.beams,
            do_sample=False,
            pad_token_id=group.base.pad_id,
            eos_token_id=end,
            return_dict_in_generate=True,
        )
        with group.bound(batch, shares) as model:
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
            if hasattr(out.past_key_values, "batch_select_indices"):
                out.past_key_values.batch_select_indices(stay)
                known["past_key_values"] = out.past_key_values
            mask = functional.pad(mask[stay], (0, written.shape[1] - ids.shape[1]), value=1)
            ids = written[stay]


def _likelihoods(
    group: _Group,
    questions: Sequence[_Questions],
    shares: _Shares | None,
    batch_size: int,
    watched: Watched | None,
) -> list[Scores]:
    """Answer loss, and accuracy over options; the right option is computed once for both."""
    sums, counts = _sums(group, questions, shares, batch_size, watched)
    found, before = [], 0
    for asked in questions:
        firsts = [before, *accumulate((len(question) for question in asked), initial=before)][1:-1]
        metrics = {"loss": float(sums[firsts].sum() / counts[firsts].sum().clamp(min=1))}
        right = [
            int(sums[first : first + len(question)].argmin()) == 0
            for first, question in zip(firsts, asked, strict=True)
            if question[0].answer in question[0].options
        ]
        if right:
            metrics["accuracy"] = sum(right) / len(right)
        losses = (sums[firsts] / counts[firsts].clamp(min=1)).tolist()
        found.append(Scores(metrics, losses=tuple(losses)))
        before += sum(map(len, asked))
    return found


def _sums(
    group: _Group,
    questions: Sequence[_Questions],
    shares: _Shares | None,
    batch_size: int,
    watched: Watched | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of answer losses and number of answer tokens, float64, of every answer in turn."""
    base, device = group.base, group.base.adapted.device
    pack = all(_pack(base, asked) for asked in questions)
    texts = _texts(questions, pack=pack)
    if shares is not None:
        shares = [
            weights[[text.question for text in each]]
            for weights, each in zip(shares, texts, strict=True)
        ]
    sums = torch.zeros(sum(len(text.answers) for each in texts for text in each)).double()
    counts = torch.zeros_like(sums)
    sizes = [[max(len(answer.ids) for answer in text.answers) for text in each] for each in texts]
    # Answers are written a token at a time, which wants many rows; likelihoods fill a pass at once.
    for batch in in_turn(sizes, batch_size, usual_tokens(base)):
        chosen = [[texts[client][at] for at in of_client] for client, of_client in batch]
        rows = [row for each in chosen for text in each for row in text.rows]
        answers = [text.answers for each in chosen for text in each]
        if pack:
            whole = answers_in_one([[text.answers for text in each] for each in chosen], device)
        else:
            whole = collate(answers, base.pad_id, device)
        clients = [at for at, each in enumerate(chosen) for text in each for _ in text.rows]
        wide = [text.tokens if pack else whole.ids.shape[1] for each in chosen for text in each]
        starts = accumulate(wide, initial=0)
        owners = [client for client, of_client in batch for _ in of_client]
        seen = [
            (client, range(start, start + len(text.answers[0].ids) - 1))
            for client, text, start in zip(owners, chain(*chosen), starts, strict=False)
            if watched is not None and text.right and text.question < watched.examples
        ]
        with (
            _watching(watched, seen, whole.ids.numel()) as watch,
            group.bound(
                batch,
                shares,
                packing=whole.packing,
                labelled=whole.labelled(len(batch), clients),
                watch=watch,
            ) as model,
        ):
            try:
                losses = token_losses(model, whole).double()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise TrainingError(
                    f"out of memory while scoring {len(rows)} texts, {whole.ids.numel()} tokens "
                    "at once; lower --eval-batch-size or --max-length"
                ) from error
        zeros = losses.new_zeros(len(rows))
        sums[rows] = zeros.index_add(0, whole.owners, losses).cpu()
        counts[rows] = zeros.index_add(0, whole.owners, torch.ones_like(losses)).cpu()
    return sums, counts


def _texts(questions: Sequence[_Questions], *, pack: bool) -> list[list[_Text]]:
    """What goes through the model for each client's questions."""
    found: list[list[_Text]] = []
    row = 0
    for asked in questions:
        found.append([])
        for number, answers in enumerate(asked):
            for first, together in enumerate([answers] if pack else [[each] for each in answers]):
                rows = range(row, row := row + len(together))
                found[-1].append(_Text(number, together, rows, first == 0))
    return found


def _watching(
    watched: Watched | None, seen: Sequence[tuple[int, range]], of: int
) -> AbstractContextManager[Watch | None]:
    """Counts the weights of these tokens of a pass, each for its client, if that is wanted."""
    if watched is None or not any(where for _, where in seen):
        return nullcontext()
    return watched.tally.counting(seen, of)


def _classified(
    group: _Group,
    examples: Sequence[Sequence[Example]],
    shares: _Shares | None,
    batch_size: int,
    watched: Watched | None,
) -> list[Scores]:
    """Loss, accuracy, and the names of the likeliest labels."""
    losses = [torch.zeros(len(each)) for each in examples]
    guesses = [torch.zeros(len(each), dtype=torch.long) for each in examples]
    for batch in in_turn([[len(each.ids) for each in of] for of in examples], batch_size):
        chosen = [(client, at) for client, texts in batch for at in texts]
        rows = [examples[client][at] for client, at in chosen]
        whole = collate([rows], group.base.pad_id, group.base.adapted.device)
        seen = [
            (client, range(start, start + len(examples[client][at].ids)))
            for (client, at), start in zip(chosen, count(0, whole.ids.shape[1]), strict=False)
            if watched is not None and at < watched.examples
        ]
        with (
            _watching(watched, seen, whole.ids.numel()) as watch,
            group.bound(batch, shares, watch=watch) as model,
        ):
            logits = model(input_ids=whole.ids, attention_mask=whole.mask).logits.float()
        found = functional.cross_entropy(logits, whole.targets, reduction="none").cpu()
        likeliest = logits.argmax(-1).cpu()
        for row, (client, at) in enumerate(chosen):
            losses[client][at], guesses[client][at] = found[row], likeliest[row]
    return [
        Scores(
            {
                "loss": float(loss.mean()),
                "accuracy": fmean(int(g) == each.label for g, each in zip(guess, of, strict=True)),
            },
            tuple(each.options[int(g)] for g, each in zip(guess, of, strict=True)),
            tuple(loss.tolist()),
        )
        for loss, guess, of in zip(losses, guesses, examples, strict=True)
    ]


def _sizes(texts: Sequence[Sequence[Ids]]) -> list[list[int]]:
    return [[len(ids) for ids in each] for each in texts]


def _text_of_tokens(packing: Packing) -> Tensor:
    """Which text each token of a packed row belongs to."""
    return (packing.positions[0] == 0).cumsum(0).cpu() - 1
