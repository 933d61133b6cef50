"""A method's only access to a client's data and the base model: training and scoring."""

from dataclasses import dataclass

from fedalt.data.examples import Split
from fedalt.data.task import Task
from fedalt.engine.in_process import States
from fedalt.evaluation import Scores, Scoring, score
from fedalt.methods.contract import Fit, Fitted, Serving
from fedalt.models import Base
from fedalt.seeds import seed_of
from fedalt.training.loop import Moments, OnStep, Trained, Training, TrainingError, train


@dataclass(frozen=True)
class Learner:
    """Base model, data and settings of a run; trains and scores one client at a time."""

    base: Base
    task: Task
    training: Training
    scoring: Scoring
    seed: int

    def fit(
        self,
        client_id: str,
        round_: int | str,
        number: int,
        order: Fit,
        states: States | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Fitted, Trained]:
        """Carry out an order of a client's round.

        Batches and dropout depend on run, client, round and the order's number, not on the method:
        all methods train on the same batches. `states` hold the carried optimiser state, if that
        is wanted; without them none is carried.
        """
        examples = self.task.examples(client_id, "train")
        key = f"moments/{client_id}/{number}"
        carried = states if self.training.carry_optimizer else None
        try:
            trained = train(
                self.base,
                order.plan,
                order.tree,
                order.train,
                examples,
                self.training,
                epochs=self.training.local_epochs if order.epochs is None else order.epochs,
                seed=seed_of(self.seed, client_id, round_, number),
                moments=None if carried is None else carried.get(key, Moments),
                on_step=on_step,
            )
        except TrainingError as error:
            raise TrainingError(f"client {client_id!r}, round {round_}: {error}") from error
        if carried is not None:
            carried.put(key, trained.moments)
        return Fitted(trained.tree, len(examples)), trained

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
