"""What all sides of a federation have agreed on: one file, the same bytes for everyone."""

import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import tomli_w

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import Shape
from fedalt.core.files import atomic_write
from fedalt.core.reading import FormError, StoreError, read_bytes, require
from fedalt.core.tree import Name
from fedalt.data.names import fault_of_names, fault_of_title
from fedalt.federation.messages import digest
from fedalt.federation.secure_sum import FEWEST
from fedalt.runs.settings import (
    Settings,
    SettingsError,
    method_name,
    read_table,
    settings_of,
    to_toml,
)
from fedalt.runs.setup import Parts, arms_of, trainable

FILE = "terms.toml"
_KEYS = {"name", "clients", "labels", "model", "sites", "heads"}
# The data lie with the clients; nothing opens this path.
_ELSEWHERE = "with-the-clients"


class _Head(TypedDict):
    site: str
    slot: str
    factor: str
    shape: list[int]


class _Federation(TypedDict):
    name: str
    clients: list[str]
    labels: list[str]
    model: str
    sites: dict[str, tuple[int, int]]
    heads: list[_Head]


@dataclass(frozen=True)
class Agreement:
    """Who takes part, on which base model, with which settings.

    `labels` are those of a classifier's data, `model` is the base model's fingerprint, `start`
    draws what clients begin with: the server needs no weights for it. `digest` stands for all of
    it in every message. `settings.data.path` means nothing here.
    """

    name: str
    clients: tuple[str, ...]
    labels: tuple[str, ...]
    model: str
    settings: Settings
    init: Initializer
    digest: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of a client's arms: of the method and, if there is one, of the baseline."""
        return tuple(arm.column for arm in arms_of(self.settings))


def require_apart(settings: Settings) -> None:
    """SettingsError for what only a run of all clients on one machine can do."""
    if (processes := settings.training.processes) > 1:
        raise SettingsError(
            f"processes = {processes} in [training]: the clients of a federation are processes "
            "of their own already; leave it out"
        )
    if settings.clients:
        raise SettingsError(
            "[clients] is for `fedalt run`; in a federation `fedalt federation add` and `remove` "
            "say who joins and who leaves"
        )


def require_enough_clients(settings: Settings, clients: Sequence[str]) -> None:
    """SettingsError for rounds of so few clients that their sum tells what each has sent."""
    if not settings.privacy.secure_sum:
        return
    cohort = settings.rounds.cohort(clients, 0, settings.seed)
    if len(cohort) < FEWEST:
        raise SettingsError(
            f"[privacy] secure_sum: {len(cohort)} clients train in a round, but of fewer than "
            f"{FEWEST} each would know what the others have sent"
        )


def write_agreement(
    folder: Path, name: str, clients: Sequence[str], labels: Sequence[str], parts: Parts
) -> Agreement:
    """Put a federation's terms, and its prompt template if it has one, into a folder."""
    table = tomllib.loads(to_toml(parts.settings))
    table["data"].pop("path")
    if parts.settings.data.template is not None:
        text = parts.settings.data.template.read_bytes()
        atomic_write(folder / "template.txt", text)
        table["data"]["template"] = "template.txt"
    init = parts.init
    table["federation"] = {
        "name": name,
        "clients": sorted(clients),
        "labels": list(labels),
        "model": parts.base.fingerprint,
        "sites": {site: list(shape) for site, shape in init.sites.items()},
        "heads": [
            {"site": name.site, "slot": name.slot, "factor": name.factor, "shape": list(shape)}
            for name, shape in init.heads.items()
        ],
    }
    atomic_write(folder / FILE, tomli_w.dumps(table).encode())
    return read_agreement(folder / FILE)


def read_agreement(file: Path) -> Agreement:
    """The terms in a file. Raises SettingsError."""
    try:
        whole = read_bytes(file)
    except StoreError as error:
        raise SettingsError(str(error)) from None
    table = read_table(file)
    about: Any = table.pop("federation", None)
    if not isinstance(about, dict) or about.keys() != _KEYS:
        raise SettingsError(
            f"{file}: [federation]: expected exactly {', '.join(sorted(_KEYS))}; "
            "`fedalt federation init` writes this file, and nobody edits it"
        )
    data = table.get("data", {})
    if not isinstance(data, dict):
        raise SettingsError(f"{file}: [data]: expected a section, got {data!r}")
    settings = settings_of({**table, "data": {**data, "path": _ELSEWHERE}}, str(file))
    try:
        if settings.data.template is not None:
            whole += read_bytes(settings.data.template)
        require(about, _Federation)
    except StoreError as error:
        raise SettingsError(str(error)) from None
    except FormError as error:
        raise SettingsError(f"{file}: [federation] {error}") from None
    if fault := fault_of_names(about["clients"]) or fault_of_title(about["name"]):
        raise SettingsError(f"{file}: [federation] {fault}")
    return Agreement(
        name=about["name"],
        clients=tuple(about["clients"]),
        labels=tuple(about["labels"]),
        model=about["model"],
        settings=settings,
        init=_start(about, settings.seed),
        digest=digest(whole),
    )


def facts_of(agreement: Agreement) -> dict[str, object]:
    """What run.json of a federation's server holds; the data are with the clients."""
    packages = {name: version(name) for name in ("fedalt", "torch")}
    arms = arms_of(agreement.settings)
    return {
        "terms": agreement.digest,
        "versions": {"python": platform.python_version(), **packages},
        "data": {
            "fingerprint": "with the clients",
            "kind": "classify" if agreement.labels else "generate",
            "labels": list(agreement.labels),
            "template": "",
        },
        "model": {"name": agreement.settings.model.name, "fingerprint": agreement.model},
        "method": method_name(agreement.settings.method),
        "trainable_numbers": {arm.column: trainable(arm, agreement.init) for arm in arms},
        "clients": {client_id: {} for client_id in agreement.clients},
        "warnings": [],
    }


def _start(about: Mapping[str, Any], seed: int) -> Initializer:
    """What draws the first tensors, from sites and heads as the terms list them."""
    heads = {
        Name(head["site"], head["slot"], head["factor"]): tuple(head["shape"])
        for head in about["heads"]
    }
    sites = {site: Shape(*shape) for site, shape in about["sites"].items()}
    return Initializer(sites, heads, seed, len(about["clients"]))
