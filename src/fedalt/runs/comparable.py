"""Whether runs can be compared: found before the first one trains, or once all are there."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fedalt.core.settings import DataSettings, ModelSettings
from fedalt.data.errors import DataError
from fedalt.data.folder import DataFolder, open_data
from fedalt.data.prompts import read_template
from fedalt.data.records import Columns
from fedalt.runs.compare import Entry, Job
from fedalt.runs.folder import StoreError, open_run
from fedalt.runs.kept_settings import require_same_data, require_settings, require_unchanged
from fedalt.runs.preflight import require_known
from fedalt.runs.settings import SettingsError


def require_tests(file: Path, entries: Sequence[Entry]) -> None:
    """Refuse methods whose test data would not be scored: they cannot be compared. SettingsError.

    `fedalt tune` needs none.
    """
    for entry in entries:
        if not entry.settings.rounds.test:
            raise SettingsError(
                f"{file}: {entry.label}: [rounds] test = false leaves nothing to compare"
            )


def require_same(jobs: Sequence[Job], *, grows: bool = False) -> None:
    """Refuse runs that have other settings; with `grows` their rounds may differ. StoreError."""
    free = [("scoring", "base"), *([("rounds", "rounds")] if grows else [])]  # trains nothing else
    for job in jobs:
        if job.is_begun:
            require_settings(job.path, job.settings, free)
            require_unchanged(job.path, open_run(job.path).facts(), job.settings)


def require_data(jobs: Sequence[Job]) -> None:
    """Find mistakes in client data, and clients nobody knows, before the first run. DataError.

    StoreError where a run has begun with other data.
    """
    folders: dict[DataSettings, DataFolder] = {}
    for settings in (job.settings for job in jobs):
        data = settings.data
        if data not in folders:
            folders[data] = open_data(data.path, Columns.of(data))
        folder = folders[data]
        require_known(settings, folder.clients)
        if settings.rounds.test and not any(folder.counts(c, "test") for c in folder.clients):
            raise DataError(f"{data.path}: no client has test data, so there is nothing to compare")
    for job in jobs:
        if not job.is_begun:
            continue
        data = job.settings.data
        template = read_template(data.template)
        facts = open_run(job.path).facts()
        require_same_data(job.path, facts, folders[data].fingerprint, template.text)


def require_one_base(jobs: Iterable[Job]) -> None:
    """Refuse runs whose base model has one name and is two, as its file was replaced. StoreError.

    Those that have not begun are left out.
    """
    known: dict[ModelSettings, tuple[str, Path]] = {}
    for job in jobs:
        if not job.is_begun:
            continue
        fingerprint = open_run(job.path).facts()["model"]["fingerprint"]
        first, path = known.setdefault(job.settings.model, (fingerprint, job.path))
        if first != fingerprint:
            raise StoreError(
                f"{path} and {job.path} were trained on different base models, both called "
                f"{job.settings.model.name!r}: the model has been replaced in between; take "
                "another --out"
            )
