"""A method's only access to a client's data and the base model: training and scoring."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from scipy.optimize import minimize
from torch import Tensor

from fedalt.core.seeds import generator, seed_of
from fedalt.data.examples import Example, Split
from fedalt.data.task import Task
from fedalt.engine.round import CarryOut, States
from fedalt.evaluation import Scores, Scoring, embed, in_groups, score, score_together
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.training.group import Share, Trained, Training, TrainingError
from fedalt.training.loop import fit_together, passes, train_together
from fedalt.training.orders import Embed, Fit, Fitted, Found, Moments, Order, Search

Given = tuple[str, int, Order]
OnStep = Callable[[str, int, int, float], None]

_MOST_SPARED: Final = 32


@dataclass(frozen=True)
class _Asked:
    """One client's part of a fit, and where its optimiser state is carried."""

    client_id: str
    share: Share
    key: str
    carried: States | None


@contextmanager
def _named(clients: Sequence[str], round_: int | str) -> Iterator[None]:
    """Training that fails says whose it was."""
    try:
        yield
    except TrainingError as error:
        known = clients if error.which is None else [clients[error.which]]
        who = f"client{'s' if len(known) > 1 else ''} {', '.join(map(repr, known))}"
        raise TrainingError(f"{who}, round {round_}: {error}") from error


@dataclass(frozen=True)
class Learner:
    """Base model, data and settings of a run; trains and scores its clients."""

    base: Base
    task: Task
    training: Training
    scoring: Scoring
    seed: int

    def carry_out(
        self, round_: int, states: States, on_step: OnStep | None = None
    ) -> Callable[[Sequence[Given]], list[tuple[Any, Trained | None]]]:
        """Carries out orders of a round: the answer to each and, after a `Fit`, its cost.

        Fits that can share their passes through the base model do. Batches and dropout depend on
        run, client, round and the order's number, not on the method: all methods train on the same
        batches. `states` hold the carried optimiser state, if that is wanted.
        """
        return lambda orders: self._all(orders, round_, states, on_step)

    def groups(self, cohort: Sequence[str]) -> Iterator[list[str]]:
        """The cohort in groups whose steps are together about as large as a pass should be."""
        steps = {}
        for client_id in sorted(cohort):
            examples, mean = self.task.training_size(client_id)
            steps[client_id] = mean * min(self.training.batch_size, examples)
        return passes(self.base, self.training, steps)

    def _all(
        self,
        orders: Sequence[Given],
        round_: int | str,
        states: States | None = None,
        on_step: OnStep | None = None,
    ) -> list[tuple[Any, Trained | None]]:
        found: dict[int, tuple[Any, Trained | None]] = {}
        fits: list[tuple[int, _Asked]] = []
        for at, (client_id, number, order) in enumerate(orders):
            match order:
                case Fit():
                    fits.append((at, self._asked(client_id, round_, number, order, states)))
                case Embed():
                    found[at] = self._embed(client_id, order), None
                case Search():
                    with _named([client_id], round_):
                        found[at] = self._search(client_id, order), None
        while fits:
            first = fits[0][1].share
            together = [
                fits[0],
                *(each for each in fits[1:] if fit_together(self.base, first, each[1].share)),
            ]
            fits = [each for each in fits if each not in together]
            asked = [each for _, each in together]

            def hear(
                which: int, done: int, of: int, loss: float, asked: list[_Asked] = asked
            ) -> None:
                if on_step is not None:
                    on_step(asked[which].client_id, done, of, loss)

            with _named([each.client_id for each in asked], round_):
                shares = [each.share for each in asked]
                trained = train_together(self.base, shares, self.training, hear)
            for (at, each), result in zip(together, trained, strict=True):
                if each.carried is not None:
                    each.carried.put(each.key, result.moments)
                fitted = Fitted(result.tree, len(each.share.examples), result.moments)
                found[at] = fitted, result
        return [found[at] for at in range(len(orders))]

    def deploying(self, round_: int) -> CarryOut:
        """Carries out what clients order before they serve, the same way every time."""
        return self._for(f"deploy {round_}")

    def joining(self, round_: int) -> CarryOut:
        """Carries out what clients order that join after a round."""
        return self._for(f"join {round_}")

    def _for(self, what: str) -> CarryOut:
        return lambda *order: self._all([order], what)[0][0]

    def _asked(
        self, client_id: str, round_: int | str, number: int, order: Fit, states: States | None
    ) -> "_Asked":
        """What one client brings to a fit."""
        examples = self.task.examples(client_id, "train")
        if order.spare:
            spared = set(self._spared(client_id, order.spare))
            examples = [example for example in examples if example not in spared] or examples
        key = f"moments/{client_id}/{number}"
        carried = states if self.training.carry_optimizer and order.moments is None else None
        if carried is not None:
            moments = carried.get(key, Moments) or Moments()
            # A method that trains something else than before begins anew.
            goes_on = moments.first.keys() == order.descending
            order = replace(order, moments=moments if goes_on else Moments())
        seed = seed_of(self.seed, client_id, round_, number)
        return _Asked(client_id, Share(order, examples, seed), key, carried)

    def _embed(self, client_id: str, order: Embed) -> Tensor:
        examples = self._drawn(client_id, "references")[: order.examples]
        prompts = [example.prompt_ids for example in examples]
        return embed(self.base, order.plan, order.tree, prompts, self.scoring.batch_size)

    def _search(self, client_id: str, order: Search) -> Found:
        """Nelder and Mead's simplex; the best numbers it looked at, which it may have left."""
        scoring = replace(self.scoring, generate=False)
        # Without options there is nothing but the loss to compute.
        spared = self._spared(client_id, order.spare)
        examples = [replace(example, options=()) for example in spared]
        seen: list[Found] = []

        def objective(numbers: Sequence[float]) -> float:
            found = tuple(float(each) for each in numbers)
            serving = Serving(order.plan, order.tree_of(found))
            loss = score(self.base, serving, examples, scoring).metrics["loss"]
            seen.append(Found(found, loss + order.penalty(found)))
            return seen[-1].objective

        bounds = [(-order.bound, order.bound)] * len(order.start)
        limit = {"maxfev": order.evaluations}
        minimize(objective, order.start, method="Nelder-Mead", bounds=bounds, options=limit)
        return min(seen, key=lambda each: each.objective)

    def _spared(self, client_id: str, share: float) -> Sequence[Example]:
        """The share of a client's training examples that searches look at, one at least."""
        drawn = self._drawn(client_id, "spared")
        return drawn[: max(1, min(int(share * len(drawn)), _MOST_SPARED))]

    def _drawn(self, client_id: str, purpose: str) -> Sequence[Example]:
        """All training examples of a client in an order that is the same every time."""
        examples = self.task.examples(client_id, "train")
        stream = generator(self.seed, client_id, purpose)
        return [examples[at] for at in torch.randperm(len(examples), generator=stream).tolist()]

    def scored(
        self, clients: Sequence[str], split: Split
    ) -> Iterator[list[tuple[str, Sequence[Example]]]]:
        """Clients with data in a split, and those data, in groups that are scored together."""
        given = ((client_id, self.task.examples(client_id, split)) for client_id in clients)
        return in_groups(given, self.scoring)

    def score(
        self,
        clients: Sequence[tuple[Serving, Sequence[Example]]],
        *,
        generate: bool = True,
        watch: int = 0,
    ) -> list[Scores]:
        """Scores of each client's serving on some of its examples; see `score_together`."""
        scoring = (
            self.scoring
            if generate
            else Scoring(batch_size=self.scoring.batch_size, generate=False)
        )
        return score_together(self.base, clients, scoring, watch=watch)
