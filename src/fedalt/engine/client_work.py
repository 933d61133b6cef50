"""What clients of one arm do on the machine where their data lie: train, and score what they serve.

In a run's process, in its worker processes and at a federation's client it is the same.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any, ClassVar, Final

from fedalt.adapters.initializer import Initializer
from fedalt.core import tree as trees
from fedalt.engine.adaptive_clip import WITHIN
from fedalt.engine.example_log import example_log, mixer_facts
from fedalt.engine.generators import Execute, run_generators
from fedalt.engine.local_trainer import LocalTrainer
from fedalt.engine.privacy import Protection
from fedalt.engine.schedule import Arm, Event, HeldOut
from fedalt.engine.states import States, client_of
from fedalt.engine.traffic import Coding
from fedalt.engine.uploads import Metrics, Upload
from fedalt.methods.contract import AnyMethod, Local, Message, Serving
from fedalt.training.group import Trained, TrainingError
from fedalt.training.orders import Moments

TRAINED: Final = "trained "
WATCHED: Final = 8  # examples of each client on which a mixer's weights are looked at


@dataclass(frozen=True)
class Scored:
    """A client's metrics by column, and as JSON its mixer's facts and lines of its examples."""

    TAG: ClassVar = "scored"

    client_id: str
    metrics: Mapping[str, Metrics]
    mixer: str = ""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClientWork:
    """Trains clients of an arm in a round, or scores what they serve after it.

    `states` are read as of the round before, or after, the one; `sent` is what the server sends a
    client then. `protection` is what training does for privacy, where anything does. `coding` makes
    uploads shorter, as changes of what the server is `expecting` them to be of.
    """

    arm: Arm
    init: Initializer
    trainer: LocalTrainer
    states: States
    round: int
    sent: Callable[[str], Message]
    on_event: Callable[[Event], None]
    coding: Coding
    protection: Protection | None = None
    expecting: str | None = None

    def train(self, group: Sequence[str]) -> list[Upload]:
        """The clients train, as many as can in one pass; their new states are put, uploads come.

        What the round makes of the uploads decides whether the states stay.
        """
        began = time.monotonic()
        fits: dict[str, list[Trained]] = {client_id: [] for client_id in group}

        def on_fit(client_id: str, trained: Trained) -> None:
            # The tree and the moments of a whole group do not stay in memory.
            fits[client_id].append(replace(trained, tree={}, moments=Moments()))

        execute = partial(
            self.trainer.execute,
            when=self.round,
            states=self.states,
            on_step=self._on_step,
            on_fit=on_fit,
            protection=self.protection,
        )
        told: dict[str, dict[str, float]] = {client_id: {} for client_id in group}
        steps = {client_id: self._local(client_id, told[client_id]) for client_id in group}
        ends = run_generators(steps, execute)
        seconds = (time.monotonic() - began) / max(len(group), 1)
        for client_id, (state, _) in ends.items():
            self.states.put(f"clients/{client_id}", state)
        send = self.coding.send
        return [
            Upload(
                client_id,
                send(self.states, client_id, message, self.expecting),
                seconds,
                {**training_metrics(fits[client_id]), **told[client_id]},
            )
            for client_id, (_, message) in ends.items()
        ]

    def score(
        self,
        group: Sequence[str],
        *,
        split: HeldOut,
        whole: bool,
        show: bool = False,
        watch: bool = False,
    ) -> list[Scored]:
        """Score what the clients serve on a split; who has no example of it is left out.

        `whole` scores the shared part and generated texts too, which is what takes long. With
        `watch`, mixers' weights are looked at; with `show`, the best and worst examples are told.
        """
        data = {
            client_id: examples
            for client_id in group
            if (examples := self.trainer.task.examples(client_id, split))
        }
        execute = self.trainer.before_serving(self.round)
        served = {
            client_id: servings(
                self.arm.method, self._client(client_id), self.sent(client_id), client_id, execute
            )
            for client_id in data
        }
        own = {client_id: serving for client_id, (serving, _) in served.items()}
        scores = self.trainer.score(
            [(own[client_id], data[client_id]) for client_id in data],
            generate=whole,
            watch=WATCHED if watch else 0,
        )
        shared = {
            client_id: serving
            for client_id, (_, serving) in served.items()
            if whole and serving is not None
        }
        unlike = [who for who, serving in shared.items() if not _same(serving, own[who])]
        of_shared = dict(
            zip(
                unlike,
                self.trainer.score([(shared[who], data[who]) for who in unlike]),
                strict=True,
            )
        )
        scored = []
        for client_id, score in zip(data, scores, strict=True):
            metrics: dict[str, Metrics] = {self.arm.column: score.metrics}
            if client_id in shared:
                metrics["shared"] = of_shared.get(client_id, score).metrics
            _require_finite(client_id, self.round, split, metrics)
            mixer = "" if score.weighing is None else json.dumps(mixer_facts(score.weighing))
            lines: list[str] = []
            if show:
                about = {"client": client_id, "column": self.arm.column, "round": self.round}
                told = example_log(self.trainer.base, own[client_id], data[client_id], score)
                lines = [json.dumps({**about, **example}) for example in told]
            scored.append(Scored(client_id, metrics, mixer, tuple(lines)))
        return scored

    def _local(self, client_id: str, told: dict[str, float]) -> Local[Any]:
        """The client's half of the round; `told` gets what it says of its privacy."""
        client, sent, protection = self._client(client_id), self.sent(client_id), self.protection
        if protection is None:
            return self.arm.method.local(client, sent)

        def tell(within: bool) -> None:
            if protection.norm is not None:
                told[WITHIN] = float(within)

        return protection.local(self.arm.method, client, sent, self.init, tell)

    def _client(self, client_id: str) -> object:
        return client_of(self.arm.method, self.init, self.states, client_id)

    def _on_step(self, client_id: str, done: int, of: int, loss: float) -> None:
        self.on_event(Event("train", self.round, self.arm.column, client_id, done, of, loss))


def servings(
    method: AnyMethod, client: object, message: Message, client_id: str, execute: Execute
) -> tuple[Serving, Serving | None]:
    """What a client would serve now, and the shared part alone if there is one."""
    own = run_generators({client_id: method.deploy(client, message)}, execute)[client_id]
    return own, method.shared(client, message)


def training_metrics(fits: Sequence[Trained]) -> dict[str, float]:
    """Mean loss over all steps of a client's fits, their number, and their tokens.

    Under TRAINED with slot and factor: how many numbers they trained, once if two fits did.
    """
    steps = sum(fit.steps for fit in fits)
    loss = sum(fit.loss * fit.steps for fit in fits) / max(steps, 1)
    trained = {
        f"{TRAINED}{slot} {factor}": count
        for fit in fits
        for (slot, factor), count in sorted(fit.trained.items())
    }
    return {"loss": loss, "steps": steps, "tokens": sum(fit.tokens for fit in fits), **trained}


def _require_finite(
    client_id: str, round_: int, split: HeldOut, metrics: Mapping[str, Metrics]
) -> None:
    """A model whose losses are not numbers has no score: it would seem right or wrong by chance."""
    # What is tested was trained in rounds that are done, which a resumed run does not repeat.
    advice = "start another run with" if split == "test" else "try"
    for column, of_column in metrics.items():
        if not isfinite(of_column["loss"]):
            raise TrainingError(
                f"client {client_id!r}, round {round_ + 1}: the {split} loss of column {column!r} "
                f"is {of_column['loss']}, not a finite number; its model has diverged, so "
                f"{advice} a lower learning rate or alpha"
            )


def _same(left: Serving, right: Serving) -> bool:
    return left.plan == right.plan and trees.equal(left.tree, right.tree)
