"""A run over the data of clients that joined it after training, which lie elsewhere."""

from dataclasses import replace
from pathlib import Path

from fedalt.models.base import Base
from fedalt.runs.folder import RunFolder
from fedalt.runs.kept_settings import settings_of_run
from fedalt.runs.setup import Prepared, prepare


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
