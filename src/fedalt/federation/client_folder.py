"""A client of a federation in its folder: its model loaded, its data read, all of it checked."""

from dataclasses import replace
from pathlib import Path

from fedalt.core.files import make_private_folder
from fedalt.federation.accepted import claim, read_accepted
from fedalt.federation.agreement import Agreement
from fedalt.federation.client import Client
from fedalt.federation.owner_messages import Say, silent
from fedalt.federation.privacy import client_budget
from fedalt.federation.secure_client import SecureClient
from fedalt.federation.secure_keys import Signatures
from fedalt.models.base import Base
from fedalt.models.identity import parts_that_differ
from fedalt.runs.settings import Settings, SettingsError
from fedalt.runs.setup import Parts, Prepared, prepare, trainer_of


def open_client(
    agreement: Agreement,
    client_id: str,
    data: Path,
    folder: Path,
    *,
    model: str | None = None,
    device: str | None = None,
    say: Say = silent,
    signatures: Signatures | None = None,
    base: Base | None = None,
) -> Client:
    """Load the model and read the data of one client; its folder is made if it is not there.

    `base` is the agreed model, if it is loaded already.

    Raises SettingsError, DataError, ModelError or StoreError where something does not fit.
    """
    if client_id not in agreement.clients:
        raise SettingsError(
            f"client {client_id!r} is not in terms.toml of {agreement.name!r}, which names "
            f"{', '.join(agreement.clients)}"
        )
    if folder.exists():  # before a model is loaded for nothing
        read_accepted(folder).kept.digests.require_whole()
    settings = settings_here(agreement, data, model, device)
    prepared = prepare(settings, base=base, clients=agreement.clients, labels=agreement.labels)
    _require_fitting(prepared, agreement, client_id, data)
    for sentence in prepared.warnings:
        say(f"note: {sentence}")
    return client_in(folder, agreement, client_id, prepared, say=say, signatures=signatures)


def client_in(
    folder: Path,
    agreement: Agreement,
    client_id: str,
    prepared: Prepared,
    *,
    say: Say = silent,
    signatures: Signatures | None = None,
) -> Client:
    """A client whose model is loaded and whose data are read, in its folder. Raises StoreError."""
    make_private_folder(folder)
    accepted = claim(folder, agreement, client_id)
    examples, _ = prepared.task.training_size(client_id)
    budget = client_budget(accepted, agreement, client_id, examples)
    secure = None
    if agreement.settings.privacy.secure_sum:
        assert signatures is not None
        secure = SecureClient(agreement, client_id, folder, accepted.kept, signatures, say)
    parts, trainer = prepared.parts, trainer_of(prepared)
    return Client(agreement, client_id, parts, trainer, folder, accepted, say, budget, secure)


def _require_fitting(prepared: Prepared, agreement: Agreement, client_id: str, data: Path) -> None:
    """One client's data, of the agreed labels, for the agreed base model."""
    if prepared.task.clients != (client_id,):
        raise SettingsError(
            f"{data} holds the clients {', '.join(prepared.task.clients)}, but this is the place "
            f"of {client_id!r} alone: name its files {client_id}.train.jsonl and so on"
        )
    if tuple(prepared.task.labels) != agreement.labels:
        raise SettingsError(
            f"{data} has the labels {', '.join(prepared.task.labels) or '(none)'}, but the terms "
            f"of {agreement.name!r} say {', '.join(agreement.labels) or '(none)'}"
        )
    require_model(prepared.parts, agreement)


def settings_here(
    agreement: Agreement, data: Path, model: str | None = None, device: str | None = None
) -> Settings:
    """The agreed settings, with what lies elsewhere on this client's machine."""
    agreed = agreement.settings
    name, place = model or agreed.model.name, device or agreed.model.device
    return replace(
        agreed,
        data=replace(agreed.data, path=data),
        model=replace(agreed.model, name=name, device=place),
    )


def require_model(parts: Parts, agreement: Agreement) -> None:
    """Raise SettingsError for another base model than the agreed one."""
    here, agreed = parts.base.fingerprint, agreement.model
    if here != agreed:
        raise SettingsError(
            f"the base model {parts.base.name!r} here has the fingerprint {here!r}, but "
            f"terms.toml of {agreement.name!r} names {agreed!r}: it is another model, with "
            f"other {parts_that_differ(agreed, here)}"
        )
