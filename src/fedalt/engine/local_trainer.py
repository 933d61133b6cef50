"""A method's only access to a client's data and the base model: training and scoring."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from fedalt.core.seeds import generator, seed_of
from fedalt.data.examples import Example, Split
from fedalt.data.task import Task
from fedalt.engine.generators import Execute, Given
from fedalt.engine.privacy import Protection
from fedalt.engine.schedule import moment
from fedalt.engine.states import States
from fedalt.evaluation import Scores, Scoring, embed, in_groups, score, score_together
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.training.group import Share, Trained, Training, TrainingError
from fedalt.training.loop import fit_together, passes, train_together
from fedalt.training.orders import MOST_SPARED, Embed, Fit, Fitted, Found, Moments, Search

OnStep = Callable[[str, int, int, float], None]
OnFit = Callable[[str, Trained], None]


@dataclass(frozen=True)
class _ClientFit:
    """One client's part of a fit, and where its optimiser state is carried."""

    client_id: str
    share: Share
    key: str
    carried: States | None


@contextmanager
def _named(clients: Sequence[str], when: int | str) -> Iterator[None]:
    """Training that fails says whose it was."""
    try:
        yield
    except TrainingError as error:
        known = clients if error.which is None else [clients[error.which]]
        who = f"client{'s' if len(known) > 1 else ''} {', '.join(map(repr, known))}"
        raise TrainingError(f"{who}, {moment(when)}: {error}") from error


@dataclass(frozen=True)
class LocalTrainer:
    """Base model, data and settings of a run; trains and scores its clients."""

    base: Base
    task: Task
    training: Training
    scoring: Scoring
    seed: int

    def execute(
        self,
        orders: Sequence[Given],
        *,
        when: int | str,
        states: States | None = None,
        on_step: OnStep | None = None,
        on_fit: OnFit | None = None,
        protection: Protection | None = None,
    ) -> list[Any]:
        """Execute orders of several clients: the answer to each; `on_fit` hears what fits took.

        Fits that can share their passes through the base model do. Batches and dropout depend on
        run, client, number of the fit and `when`, a round or what else trains, not on the method:
        all methods train on the same batches. `states` hold the carried optimiser state, if that is
        wanted. `protection` decides whether they train by DP-SGD.
        """
        answers: dict[int, Any] = {}
        fits: list[tuple[int, _ClientFit]] = []
        for at, (client_id, number, order) in enumerate(orders):
            match order:
                case Fit():
                    fit = self._client_fit(client_id, when, number, order, states)
                    if protection is not None:
                        clipping = protection.clipping(client_id, when, number, order)
                        fit = replace(fit, share=replace(fit.share, clipping=clipping))
                    fits.append((at, fit))
                case Embed():
                    answers[at] = self._embed(client_id, order)
                case Search():
                    with _named([client_id], when):
                        answers[at] = self._search(client_id, order)
        while fits:
            first = fits[0][1].share
            together = [
                fits[0],
                *(fit for fit in fits[1:] if fit_together(self.base, first, fit[1].share)),
            ]
            fits = [fit for fit in fits if fit not in together]
            clients = [fit.client_id for _, fit in together]
            with _named(clients, when):
                shares = [fit.share for _, fit in together]
                trained = train_together(self.base, shares, self.training, _of(clients, on_step))
            for (at, fit), result in zip(together, trained, strict=True):
                if fit.carried is not None:
                    fit.carried.put(fit.key, result.moments)
                if on_fit is not None:
                    on_fit(fit.client_id, result)
                answers[at] = Fitted(result.tree, len(fit.share.examples), result.moments)
        return [answers[at] for at in range(len(orders))]

    def before_serving(self, round_: int) -> Execute:
        """Executes what clients order before they serve, the same way every time."""
        return partial(self.execute, when=f"deploy {round_}")

    def joining(self, round_: int) -> Execute:
        """Executes what clients order that join after a round."""
        return partial(self.execute, when=f"join {round_}")

    def groups(self, cohort: Sequence[str]) -> Iterator[list[str]]:
        """The cohort in groups whose steps are together about as large as a pass should be."""
        steps = {}
        for client_id in sorted(cohort):
            examples, mean = self.task.training_size(client_id)
            steps[client_id] = mean * min(self.training.batch_size, examples)
        return passes(self.base, self.training, steps)

    def _client_fit(
        self, client_id: str, when: int | str, number: int, order: Fit, states: States | None
    ) -> _ClientFit:
        """What one client brings to a fit."""
        examples = self.task.examples(client_id, "train")
        if order.spare:
            # Not by what they are: a text that is there twice is spared once, as it is counted.
            spared = set(self._spared(client_id, order.spare, MOST_SPARED))
            kept = [example for at, example in enumerate(examples) if at not in spared]
            examples = kept or examples
        key = f"moments/{client_id}/{number}"
        carried = states if self.training.carry_optimizer and order.moments is None else None
        if carried is not None:
            moments = carried.get(key, Moments) or Moments()
            # A method that trains something else than before begins anew.
            goes_on = moments.first.keys() == order.descending
            order = replace(order, moments=moments if goes_on else Moments())
        seed = seed_of(self.seed, client_id, when, number)
        return _ClientFit(client_id, Share(order, examples, seed), key, carried)

    def _embed(self, client_id: str, order: Embed) -> Tensor:
        examples = self.task.examples(client_id, "train")
        drawn = self._drawn(client_id, "references")[: order.examples]
        prompts = [examples[at].prompt_ids for at in drawn]
        return embed(self.base, order.plan, order.tree, prompts, self.scoring.batch_size)

    def _search(self, client_id: str, order: Search) -> Found:
        """Nelder and Mead's simplex; the best numbers it looked at, which it may have left.

        Where there are no numbers to find there is one point to look at.
        """
        scoring = replace(self.scoring, generate=False)
        every = self.task.examples(client_id, "train")
        spared = [every[at] for at in self._spared(client_id, order.spare, order.most)]
        # Without options there is nothing but the loss to compute; a classifier's name its labels.
        examples = [replace(e, options=()) if e.label is None else e for e in spared]
        seen: list[Found] = []

        def objective(numbers: Sequence[float]) -> float:
            point = tuple(float(number) for number in numbers)
            serving = Serving(order.plan, order.tree_of(point))
            loss = score(self.base, serving, examples, scoring).metrics["loss"]
            # A point at which the model has no finite loss is one that the search leaves.
            seen.append(Found(point, loss + order.penalty(point) if isfinite(loss) else inf))
            return seen[-1].objective

        if not order.start:
            objective(())
            return seen[0]
        bounds = [(-order.bound, order.bound)] * len(order.start)
        limit = {"maxfev": order.evaluations}
        minimize(objective, order.start, method="Nelder-Mead", bounds=bounds, options=limit)
        return min(seen, key=lambda look: look.objective)

    def _spared(self, client_id: str, share: float, most: int | None) -> Sequence[int]:
        """Which training examples of a client searches look at: this share, one at least."""
        drawn = self._drawn(client_id, "spared")
        return drawn[: max(1, int(share * len(drawn)))][:most]

    def _drawn(self, client_id: str, purpose: str) -> list[int]:
        """The numbers of all training examples of a client, in an order that is always the same."""
        count = len(self.task.examples(client_id, "train"))
        stream = generator(self.seed, client_id, purpose)
        numbers: list[int] = torch.randperm(count, generator=stream).tolist()
        return numbers

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
        scoring = self.scoring if generate else replace(self.scoring, generate=False)
        return score_together(self.base, clients, scoring, watch=watch)


def _of(clients: Sequence[str], on_step: OnStep | None) -> Callable[..., None] | None:
    """Tells which client of a group has taken a step."""
    if on_step is None:
        return None
    return lambda which, done, of, loss: on_step(clients[which], done, of, loss)
