"""A method's only access to a client's data and the base model: training and scoring."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from scipy.optimize import minimize

from fedalt.data.examples import Example, Split
from fedalt.data.task import Task
from fedalt.engine.in_process import CarryOut, States
from fedalt.evaluation import Scores, Scoring, embed, score
from fedalt.methods.contract import Serving
from fedalt.models import Base
from fedalt.seeds import generator, seed_of
from fedalt.training.loop import OnStep, Trained, Training, TrainingError, train
from fedalt.training.orders import Embed, Fit, Fitted, Found, Moments, Order, Search

_MOST_SPARED: Final = 32


@dataclass(frozen=True)
class Learner:
    """Base model, data and settings of a run; trains and scores one client at a time."""

    base: Base
    task: Task
    training: Training
    scoring: Scoring
    seed: int

    def carry_out(
        self,
        client_id: str,
        round_: int | str,
        number: int,
        order: Order,
        states: States | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Any, Trained | None]:
        """Carry out an order of a client's round; its answer and, after a `Fit`, its cost.

        Batches and dropout depend on run, client, round and the order's number, not on the method:
        all methods train on the same batches. `states` hold the carried optimiser state, if that
        is wanted; without them none is carried.
        """
        try:
            match order:
                case Fit():
                    return self._fit(client_id, round_, number, order, states, on_step)
                case Embed():
                    examples = self._drawn(client_id, "references")[: order.examples]
                    prompts = [example.prompt_ids for example in examples]
                    size = self.scoring.batch_size
                    return embed(self.base, order.plan, order.tree, prompts, size), None
                case Search():
                    return self._search(client_id, order), None
        except TrainingError as error:
            raise TrainingError(f"client {client_id!r}, round {round_}: {error}") from error

    def deploying(self, round_: int) -> CarryOut:
        """Carries out what clients order before they serve, the same way every time."""
        return self._for(f"deploy {round_}")

    def joining(self, round_: int) -> CarryOut:
        """Carries out what clients order that join after a round."""
        return self._for(f"join {round_}")

    def _for(self, what: str) -> CarryOut:
        return lambda client_id, number, order: self.carry_out(client_id, what, number, order)[0]

    def _fit(
        self,
        client_id: str,
        round_: int | str,
        number: int,
        order: Fit,
        states: States | None,
        on_step: OnStep | None,
    ) -> tuple[Fitted, Trained]:
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
        trained = train(self.base, order, examples, self.training, seed=seed, on_step=on_step)
        if carried is not None:
            carried.put(key, trained.moments)
        return Fitted(trained.tree, len(examples), trained.moments), trained

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

    def score(
        self, client_id: str, split: Split, serving: Serving, *, generate: bool = True
    ) -> Scores:
        """Metrics of a serving on one split of a client's data; none where the split is empty."""
        scoring = (
            self.scoring
            if generate
            else Scoring(batch_size=self.scoring.batch_size, generate=False)
        )
        return score(self.base, serving, self.task.examples(client_id, split), scoring)
