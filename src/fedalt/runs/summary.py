"""The last line of a run's record: what is known from its clients' states, computed once.

That is what they trained, steps in the rounds and before serving, and how far apart they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch

from fedalt.adapters.initializer import Initializer
from fedalt.engine.client_work import TRAINED
from fedalt.engine.generators import Given, run_generators
from fedalt.engine.schedule import Line, Progress
from fedalt.engine.states import server_of
from fedalt.runs.folder import RunFolder
from fedalt.runs.record import summary_in
from fedalt.runs.settings import Settings, lora_of
from fedalt.runs.similarity import similarity_of
from fedalt.training.batches import steps_per_epoch
from fedalt.training.orders import Embed, Fit, Fitted, Found, Search

# What a layer or a head consists of; other factors, such as lengths of B, are another form of it.
_WHOLE = ("A", "B", "G", "weight", "bias")


@dataclass(frozen=True)
class Effort:
    """The part of `runs.cells.Cost` that the record's other lines do not tell; see there."""

    steps: float = 0.0
    serving_steps: float = 0.0
    trained: Mapping[str, int] = field(default_factory=dict)
    least_numbers: int = 0
    trainable_numbers: int = 0
    ranks: tuple[int, int] = (0, 0)


def summarise(folder: RunFolder, settings: Settings, on_record: Callable[[Line], None]) -> None:
    """Add its summary to the record of a tested run that has none; use it within `locked`."""
    progress = folder.progress()
    if not progress.tested or is_summarised(folder, progress):
        return
    line = {
        "kind": "summary",
        "round": progress.rounds_done - 1,
        "effort": asdict(effort_of(folder, settings)),
        "similarity": similarity_of(folder, settings, progress),
    }
    folder.record(line)
    on_record(line)
    folder.commit(progress)


def is_summarised(folder: RunFolder, progress: Progress) -> bool:
    """Whether a run has been tested and has a summary; one made longer needs another."""
    summary = summary_in(folder.lines())
    last = progress.rounds_done - 1
    return progress.tested and summary is not None and summary["round"] == last


def effort_of(folder: RunFolder, settings: Settings) -> Effort:
    """What the clients trained, by the run's record and by their last states."""
    steps: dict[str, float] = {}
    trained: dict[str, dict[str, int]] = {}
    for line in folder.lines():
        if line["kind"] != "train" or line["column"] != "own":
            continue
        client, metrics = line["client"], line["metrics"]
        steps[client] = steps.get(client, 0) + metrics["steps"]
        parts = trained.setdefault(client, {})
        for key, count in metrics.items():
            if key.startswith(TRAINED):
                part = key.removeprefix(TRAINED)
                parts[part] = max(parts.get(part, 0), int(count))
    if not steps:
        return Effort()
    serving = _serving(folder, settings, sorted(steps.keys() - folder.left()))
    for client, (_, parts) in serving.items():
        trained[client] = {**trained[client], **parts}
    numbers = {client: _by_slot(parts) for client, parts in trained.items()}
    most = max(numbers.values(), key=lambda slots: sum(slots.values()))
    given: Mapping[str, int] = getattr(settings.method, "ranks", {})
    ranks = [given.get(client, lora_of(settings.method).rank) for client in steps]
    return Effort(
        steps=fmean(steps.values()),
        serving_steps=fmean(count for count, _ in serving.values()) if serving else 0.0,
        trained=most,
        least_numbers=min(sum(slots.values()) for slots in numbers.values()),
        trainable_numbers=sum(most.values()),
        ranks=(min(ranks), max(ranks)),
    )


def _by_slot(trained: Mapping[str, int]) -> dict[str, int]:
    """Numbers by slot; a factor's parts count where the factor itself was not trained."""
    numbers: dict[str, int] = {}
    for key, count in trained.items():
        slot, factor = key.rsplit(" ", 1)
        if factor in _WHOLE:
            numbers[slot] = numbers.get(slot, 0) + count
    return numbers


def _serving(
    folder: RunFolder, settings: Settings, clients: list[str]
) -> dict[str, tuple[int, dict[str, int]]]:
    """Steps and trained numbers of each client's orders before it serves."""
    method, training = settings.method, settings.training
    states = folder.states("own", folder.rounds_done())
    nowhere = Initializer({}, {}, settings.seed)  # every client here has been trained
    server = server_of(method, nowhere, states)
    counts = folder.facts()["clients"]
    efforts: dict[str, tuple[int, dict[str, int]]] = {}
    for client_id in clients:
        client = states.get(f"clients/{client_id}", method.client_state)
        if client is None:
            continue
        fits: list[Fit] = []
        examples = counts[client_id]["train"]
        steps = {client_id: method.deploy(client, method.broadcast(server, client_id))}
        run_generators(steps, partial(_unmoved, fits, examples))
        epochs = [training.local_epochs if fit.epochs is None else fit.epochs for fit in fits]
        parts = {
            f"{slot} {factor}": count
            for fit in fits
            for (slot, factor), count in fit.trained_numbers.items()
        }
        efforts[client_id] = sum(epochs) * steps_per_epoch(examples, training.batch_size), parts
    return efforts


def _unmoved(fits: list[Fit], examples: int, orders: Sequence[Given]) -> list[Any]:
    """Answers orders as if training had moved nothing, and keeps the fits."""
    answers: list[Any] = []
    for _, _, order in orders:
        match order:
            case Fit():
                fits.append(order)
                answers.append(Fitted(order.tree, examples))
            case Embed():
                answers.append(torch.zeros(order.examples, 1))
            case Search():
                answers.append(Found(order.start, 0.0))
    return answers
