"""What has to be right on a device before anything is measured there; see gpu.py."""

import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from step_variants import Clients, Ours, Stock, copy_of, examples_of, plan_of
from transformers import PreTrainedModel

from fedalt.core.settings import Quantise
from fedalt.core.tree import Tree
from fedalt.engine.schedule import Event, Line
from fedalt.models.base import Base, load_base
from fedalt.runs.folder import RunFolder
from fedalt.runs.lifecycle import reopen, resume_run, start_run
from fedalt.runs.observer import Observer, Observers
from fedalt.runs.settings import settings_of
from fedalt.runs.setup import prepare
from fedalt.training.batches import collate
from fedalt.training.group import Share, Training
from fedalt.training.loop import train_together
from fedalt.training.loss import client_means, cross_entropy
from fedalt.training.orders import Fit

CLIENTS: Final = ("a", "b", "c")
# Of the methods that cannot do without: ranks of the clients, or a structure fixed after a round.
NEEDED: Final[Mapping[str, dict[str, Any]]] = {
    "fedlease": {"warm_up": 1},
    "hilora": {"root_rounds": 1, "cluster_rounds": 1},
    "fedtree_lora": {"warm_up": 1, "width": 3, "one_group": -1.0},
    **{
        name: {"ranks": {"a": 1, "b": 2}}
        for name in (
            *("flexlora", "florist", "owner_mean", "hetlora", "fedilora", "flora", "fslora"),
        )
    },
}
ALMOST: Final = 0.02  # by which losses in bfloat16 may differ
EXACT: Final = 1e-4  # by which gradients in float32 may; sums are taken in another order


@dataclass(frozen=True)
class Proof:
    """What was shown on a device, whether it holds, and the figure that says so."""

    what: str
    holds: bool
    figure: str


def texts_for(model: PreTrainedModel, clients: int = 4, each: int = 2) -> Clients:
    """Texts of token ids that a model knows."""
    return examples_of(clients, each, model.config.vocab_size)


def moved(
    model: PreTrainedModel, device: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A copy on a device, with weights of its own."""
    return copy.deepcopy(model).to(device, dtype)


@cache
def tiny_base(device: str, quantise: Quantise | None = None) -> Base:
    """The built-in base model on a device."""
    return load_base("tiny", quantise=quantise, device=device)


def gradients_in_float32(model: PreTrainedModel, device: str) -> Proof:
    """Several clients in a pass against the written layer, client by client."""
    texts = texts_for(model)
    ours = Ours(moved(model, device), texts)
    written = Stock.written(copy_of(model), texts, ours.tree)
    adapted = ours.base.adapted
    stacked = {
        name: torch.stack([leaf] * len(texts)).to(device).requires_grad_(name in ours.names)
        for name, leaf in ours.tree.items()
    }
    batch = collate(texts, 0, adapted.device, pack=True)
    assert batch.packing is not None
    with adapted.bound(plan_of(0), stacked, packing=batch.packing) as bound:
        placed = {"position_ids": batch.packing.positions, "use_cache": False}
        logits = bound(input_ids=batch.ids, **placed).logits[0, batch.predicting]
        losses = client_means(cross_entropy(logits, batch.targets), batch, len(texts))
        losses.sum().backward()
    wanted, theirs = written.gradients(ours.names)
    mine = [{name: stacked[name].grad[at].cpu() for name in ours.names} for at in range(len(texts))]  # type: ignore[index]
    worst = max(differences(mine, theirs), differ(losses.tolist(), wanted))
    return Proof("gradients against the written layer, float32", worst < EXACT, f"{worst:.0e}")


def gradients_in_training(model: PreTrainedModel, device: str) -> Proof:
    """The same in the precision of training; ours are at most as wrong as the layer written out."""
    texts = texts_for(model)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    low = moved(model, device, dtype)
    ours = Ours(copy_of(low), texts)
    exact = Stock.written(copy_of(model), texts, ours.tree)
    written = Stock.written(copy_of(low), texts, ours.tree)
    _, right = exact.gradients(ours.names)
    mine = differences(ours.gradients()[1], right)
    theirs = differences(written.gradients(ours.names)[1], right)
    name = str(dtype).removeprefix("torch.")
    return Proof(
        f"gradients in {name}, their error against that of the written layer",
        mine < max(1.5 * theirs, EXACT),
        f"{mine:.0e}, {theirs:.0e}",
    )


def differences(mine: Sequence[Tree], theirs: Sequence[Tree]) -> float:
    """The largest difference of a gradient, as a share of its norm."""
    return max(
        float((one[name] - other[name]).norm()) / float(other[name].norm())
        for one, other in zip(mine, theirs, strict=True)
        for name in one
    )


def differ(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two lists of losses; infinite where one is not finite."""
    if len(mine) != len(theirs) or not all(map(math.isfinite, mine)):
        return math.inf
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(mine, theirs, strict=True))


def checkpointing(model: PreTrainedModel, device: str) -> Proof:
    """Two steps with gradient checkpointing and without."""
    texts = texts_for(model)
    ours = Ours(moved(model, device), texts)
    order = Fit(plan_of(0.05), ours.tree, ours.names)
    shares = [Share(order, each, seed) for seed, each in enumerate(texts)]
    losses = [
        [
            trained.loss
            for trained in train_together(
                ours.base,
                shares,
                Training(local_epochs=2, batch_size=2, gradient_checkpointing=wanted),
            )
        ]
        for wanted in (False, True)
    ]
    worst = differ(*losses)
    return Proof("gradient checkpointing changes no loss", worst < ALMOST, f"{worst:.0e}")


def write_clients(folder: Path) -> Path:
    """Clients with a few short examples."""
    folder.mkdir()
    for client in CLIENTS:
        for split in ("train", "test"):
            lines = [
                json.dumps({"instruction": f"Say {n}.", "output": f"{client} {n}"})
                for n in range(4)
            ]
            (folder / f"{client}.{split}.jsonl").write_text("".join(f"{one}\n" for one in lines))
    return folder


def run(
    base: Base, folder: Path, out: Path, rounds: int, observer: Observer, **method: Any
) -> RunFolder:
    """A run on small clients; the model is loaded already."""
    table = {
        "data": {"path": str(folder), "validation": 0.25, "max_length": 60},
        "model": {"name": "tiny", "device": str(base.adapted.device)},
        "method": {"name": "fedalt", "rank": 2, "alpha": 4, **method},
        "training": {"batch_size": 4},
        "rounds": {"rounds": rounds},
        "scoring": {"generate": False},
        "local_baseline": False,
    }
    return start_run(prepare(settings_of(table, "gpu.py"), base=base), out, observer)


def scores(folder: RunFolder) -> list[float]:
    """Every loss of a run's record, in the order of what it is of."""
    lines = [line for line in folder.lines() if line["kind"] == "score"]
    key = ("split", "round", "client", "column")
    lines.sort(key=lambda line: [str(line[each]) for each in key])
    return [line["metrics"]["loss"] for line in lines]


def trains(method: str, device: str) -> Proof:
    """Two rounds of a method, and its losses against those of a CPU."""
    with tempfile.TemporaryDirectory() as name:
        data = write_clients(Path(name) / "data")
        settings = {"name": method, **NEEDED.get(method, {})}
        found = [
            scores(run(tiny_base(where), data, Path(name) / out, 2, Observers(), **settings))
            for out, where in (("here", device), ("cpu", "cpu"))
        ]
    worst = differ(*found)
    return Proof(f"{method} against a CPU", worst < ALMOST, f"{worst:.0e}")


class _CutError(Exception):
    """What ends a run in the middle."""


@dataclass(frozen=True)
class _Stop:
    """Ends a run in its second round."""

    def on_event(self, event: Event) -> None:
        """Stop at the first step of the second round."""
        if event.what == "train" and event.round == 1:
            raise _CutError

    def on_record(self, line: Line) -> None:
        """Ignore it."""


def resumes(device: str) -> Proof:
    """A run that ended in its second round and goes on, against one that did not end."""
    base = tiny_base(device)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = write_clients(place / "data")
        straight = scores(run(base, data, place / "straight", 3, Observers()))
        with suppress(_CutError):
            run(base, data, place / "cut", 3, _Stop())
        again = scores(resume_run(reopen(place / "cut", base), place / "cut"))
    worst = differ(again, straight)
    return Proof("a run that ended halfway goes on", worst < ALMOST / 10, f"{worst:.0e}")


def four_bits(device: str) -> Proof:
    """A round on a base in 4 bits: it learns, and its losses are near those of the whole base."""
    if find_spec("bitsandbytes") is None:
        return Proof("a base in 4 bits", holds=True, figure="bitsandbytes is not installed")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = write_clients(place / "data")
        found = []
        kinds: tuple[Quantise | None, ...] = ("4bit", None)
        for quantise in kinds:
            base = tiny_base(device, quantise)
            found.append(scores(run(base, data, place / f"run-{quantise}", 2, Observers())))
    worst = differ(*found)
    return Proof("a base in 4 bits, losses against the whole base", worst < 0.2, f"{worst:.0e}")


def proofs(model: PreTrainedModel, device: str, methods: Sequence[str]) -> Iterator[Proof]:
    """All of them, one after the other."""
    shown: dict[str, Callable[[], Proof]] = {
        "gradients in float32": partial(gradients_in_float32, model, device),
        "gradients in training": partial(gradients_in_training, model, device),
        "gradient checkpointing": partial(checkpointing, model, device),
        "resume": partial(resumes, device),
        "a base in 4 bits": partial(four_bits, device),
        **{method: partial(trains, method, device) for method in methods},
    }
    for what, show in shown.items():
        try:
            yield show()
        except Exception as error:  # the other proofs are still worth their time
            told = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            yield Proof(what, holds=False, figure=told)
