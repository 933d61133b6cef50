"""Everything a run needs, loaded and checked before its first step."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.reach import rows_of_embedding
from fedalt.core.settings import ModelSettings
from fedalt.core.tree import numbers
from fedalt.data.examples import Split
from fedalt.data.folder import open_data
from fedalt.data.layouts import SPLITS, not_read
from fedalt.data.prompts import read_template
from fedalt.data.records import (
    Chat,
    Columns,
    Completion,
    DataError,
    Instruction,
    LabeledText,
    Record,
    Turn,
)
from fedalt.data.task import Task
from fedalt.engine.local_trainer import LocalTrainer
from fedalt.engine.members import Members
from fedalt.engine.schedule import Arm
from fedalt.methods import METHODS
from fedalt.methods.local import LocalOnly
from fedalt.methods.lora import Lora
from fedalt.models.base import Base, load_base
from fedalt.models.checks import require_known_ids
from fedalt.runs.base_checks import (
    require_checkpointable,
    require_weighable,
    warnings_of_ranks,
)
from fedalt.runs.folder import RunFolder, StoreError
from fedalt.runs.kept_settings import settings_of_run
from fedalt.runs.preflight import require_known, require_room, warnings_of_data, warnings_of_run
from fedalt.runs.settings import Settings, lora_of, method_name
from fedalt.training.orders import Fit

_FORMS = {Instruction: "instruction", Completion: "prompt", Chat: "messages", LabeledText: "label"}


@dataclass(frozen=True)
class Parts:
    """What gives a run's states their meaning: the base model, the arms, and how they start."""

    settings: Settings
    base: Base
    arms: tuple[Arm, ...]
    init: Initializer


@dataclass(frozen=True)
class Prepared:
    """A run that can begin: all is loaded, every example has been encoded once.

    `counts` are examples per client and split; `warnings` are sentences for the user.
    """

    parts: Parts
    task: Task
    counts: Mapping[str, Mapping[Split, int]]
    warnings: tuple[str, ...]


def prepare(
    settings: Settings,
    *,
    base: Base | None = None,
    clients: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Prepared:
    """Load what the settings name and check all that can be checked before the first step.

    `base` is the model of these settings, if it is loaded already. `clients` are all that take
    part, where the data are those of some of them, and `labels` what all have agreed to call the
    answers of a classifier, in the order of its outputs.
    """
    data = open_data(settings.data.path, Columns.of(settings.data), labels=labels)
    template = read_template(settings.data.template)
    require_known(settings, clients or data.clients)
    agreed = labels or data.labels  # data without labels are refused by whoever has agreed on some
    beginners = Members(clients or data.clients, settings.clients).at(0)
    parts = load_parts(settings, agreed, base, clients=len(beginners))
    require_checkpointable(settings, parts.base)
    task = Task(
        folder=data,
        tokenizer=parts.base.tokenizer,
        template=template,
        max_length=min(settings.data.max_length, parts.base.positions),
        validation=settings.data.validation,
        seed=settings.seed,
        cut_answers=settings.data.cut_answers,
        all_answers=settings.data.train_on == "all",
    )
    rows = rows_of_embedding(parts.base.adapted.model)
    counts: dict[str, dict[Split, int]] = {}
    cut = [0, 0]
    for client_id in task.clients:
        counts[client_id] = {}
        for split in SPLITS:
            examples = task.examples(client_id, split)
            counts[client_id][split] = len(examples)
            require_known_ids(
                parts.base.tokenizer,
                (token for example in examples for token in example.ids),
                rows,
                f"client {client_id!r}, {split}",
            )
            cut = [sum(pair) for pair in zip(cut, task.cut(client_id, split), strict=True)]
        task.training_size(client_id)  # while they are encoded: a round asks for all at once
    warnings = [not_read(data.ignored)] if data.ignored else []
    warnings += [*parts.base.notes, *warnings_of_ranks(settings, parts.base)]
    if not clients:  # else the data of others are not here
        warnings += warnings_of_run(settings, counts, shares=_shares(parts))
    warnings += warnings_of_data(settings, counts, cut, task.max_length)
    return Prepared(parts, task, counts, tuple(warnings))


def question(form: str, text: str) -> Record:
    """A question in the form of a client's records, which facts hold, still without an answer."""
    match form:
        case "instruction":
            return Instruction(text, "", "")
        case "prompt":
            return Completion(text, "")
        case "messages":
            return Chat((Turn("user", text),), "")
        case _:
            raise DataError("records with labels are classified, no text is generated for them")


def load_parts(
    settings: Settings, labels: Sequence[str], base: Base | None = None, *, clients: int = 0
) -> Parts:
    """The base model with its arms; `labels` are those of a classifier's data.

    `clients` is how many take part, 0 where nothing begins that needs to know.
    """
    require_room(settings, gpus=torch.cuda.device_count())
    base = base or base_of(settings.model, labels)
    require_weighable(settings, base)
    heads, given = base.adapted.heads, base.given
    init = Initializer(base.adapted.sites, heads, settings.seed, clients, given)
    return Parts(settings, base, arms_of(settings), init)


def base_of(model: ModelSettings, labels: Sequence[str]) -> Base:
    """The base model that settings name; `labels` are those of a classifier's data."""
    return load_base(
        model.name,
        labels=labels,
        targets=model.targets,
        quantise=model.quantise,
        device=model.device,
    )


def arms_of(settings: Settings) -> tuple[Arm, ...]:
    """The method's own arm and, unless it is that already, the local-only baseline's."""
    own = Arm("own", settings.method)
    if not settings.local_baseline or METHODS.is_local_only(settings.method):
        return (own,)
    return own, Arm("local", LocalOnly(lora=lora_of(settings.method)))


def base_arm(parts: Parts) -> Arm | None:
    """What scores the base model as it is: clients that never train, whose B is zero.

    None where that is not wanted, and for a classifier whose head begins with random numbers.
    """
    drawn = parts.init.heads.keys() - parts.init.given.keys()
    if drawn or not parts.settings.scoring.base:
        return None
    return Arm("base", LocalOnly(lora=Lora(rank=1)))


def trainer_of(prepared: Prepared) -> LocalTrainer:
    """Trains and scores the clients of a prepared run."""
    settings = prepared.parts.settings
    return LocalTrainer(
        prepared.parts.base, prepared.task, settings.training, settings.scoring, settings.seed
    )


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """What run.json holds."""
    parts, task = prepared.parts, prepared.task
    forms = {client: form_of(task.records(client, "train")[0]) for client in task.clients}
    packages = {name: version(name) for name in ("fedalt", "torch", "transformers", "peft")}
    return {
        "versions": {"python": platform.python_version(), **packages},
        "data": {
            "fingerprint": task.folder.fingerprint,
            "kind": task.kind,
            "labels": list(task.labels),
            "template": task.template.text,
        },
        "model": {
            "name": parts.base.name,
            "fingerprint": parts.base.fingerprint,
            "identity": None if parts.base.identity is None else parts.base.identity.table(),
        },
        "method": method_name(parts.settings.method),
        "trainable_numbers": {arm.column: trainable(arm, parts.init) for arm in parts.arms},
        "clients": {
            client: {**counts, "form": forms[client]} for client, counts in prepared.counts.items()
        },
        "warnings": list(prepared.warnings),
    }


def form_of(record: Record) -> str:
    """What a record's form is called, in which a client's prompts are asked."""
    return _FORMS[type(record)]


def prepare_again(folder: RunFolder, base: Base | None) -> tuple[Prepared, tuple[str, ...]]:
    """A run's settings, prepared, and what was changed in them; an error says that too."""
    settings, changed = settings_of_run(folder)
    try:
        return prepare(settings, base=base), changed
    except ValueError as error:
        if not changed:
            raise
        raise StoreError(f"{'; '.join(changed)}: {error}") from error


def prepare_newcomers(
    folder: RunFolder, data: Path, epochs: int | None = None, base: Base | None = None
) -> Prepared:
    """The run's settings over newcomers' data; without `epochs`, with the run's local ones.

    `base` is the run's base model, if that is loaded already.
    """
    settings, changed = settings_of_run(folder)
    training = settings.training
    if epochs is not None:
        training = replace(training, local_epochs=epochs)
    data_settings = replace(settings.data, path=data.absolute())
    facts = folder.facts()
    prepared = prepare(
        replace(settings, data=data_settings, training=training),
        base=base,
        # Whom the settings name are clients of the run, and no newcomers.
        clients=list(facts["clients"]),
        # Newcomers need not have all of the run's labels, nor sort them as its clients do.
        labels=facts["data"]["labels"],
    )
    return replace(prepared, warnings=(*changed, *prepared.warnings))


def prepare_newcomer(folder: RunFolder, client_id: str, base: Base | None) -> Prepared | None:
    """The same for a client that has joined, as it did; None for one that was in training."""
    about = folder.facts().get("joined", {}).get(client_id)
    if about is None:
        return None
    return prepare_newcomers(folder, Path(about["data"]), about["epochs"], base)


def trainable(arm: Arm, init: Initializer) -> int:
    """How many numbers a client of the usual rank trains in its first fit, not in all."""
    method = arm.method
    client = method.init_client(init, "")
    for order in method.local(client, method.broadcast(method.init_server(init), "")):
        if isinstance(order, Fit):
            return numbers({name: order.tree[name] for name in order.train})
    return 0


def _shares(parts: Parts) -> bool:
    """Whether a client receives anything from others."""
    method, init = parts.settings.method, parts.init
    message = method.broadcast(method.init_server(init), "")
    return method.shared(method.init_client(init, ""), message) is not None
