"""How long a run is, and whether it is at its end; its rounds may change while it stands."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedalt.core.files import atomic_write
from fedalt.core.reading import read_bytes
from fedalt.runs.folder import StoreError, locked, open_run
from fedalt.runs.kept_settings import settings_of_run, settings_table
from fedalt.runs.preflight import require_known
from fedalt.runs.record import require_clients
from fedalt.runs.settings import settings_of, to_toml
from fedalt.runs.summary import is_summarised


def is_finished(path: Path) -> bool:
    """Whether all rounds of a run are done, tested and summarised."""
    folder = open_run(path)
    require_clients(path)
    settings, _ = settings_of_run(folder)
    with locked(path):
        progress = folder.progress()
        tested = is_summarised(folder, progress) or not settings.rounds.test
    return tested and progress.rounds_done >= settings.rounds.rounds


def set_rounds(path: Path, rounds: int) -> None:
    """Let a run end after so many rounds, at least as many as are done. Raises StoreError.

    What is done is what a run of that length begins with; if it was tested, it is tested again
    after the new last round. A round that was the last one has been validated, whatever
    `evaluate_every` says. Raises SettingsError, and leaves the run as it is, for a length that its
    other settings exclude.
    """
    folder = open_run(path)
    require_clients(path)
    settings, _ = settings_of_run(folder)
    with locked(path):
        done = folder.progress().rounds_done
        if rounds < done:
            raise StoreError(f"{path} has {done} rounds already; it cannot end after {rounds}")
        if rounds != settings.rounds.rounds:
            changed = replace(settings, rounds=replace(settings.rounds, rounds=rounds))
            settings_of(settings_table(changed), f"{path} with {rounds} rounds")
            require_known(changed, [*folder.facts()["clients"]])
            atomic_write(path / "settings.toml", to_toml(changed).encode())


@contextmanager
def with_rounds(path: Path, rounds: int | None) -> Iterator[None]:
    """The same, unless it is None, while a run is made ready to go on.

    If that fails, as where its data are others now, the run has the length that it had.
    """
    if rounds is None:
        yield
        return
    before = read_bytes(path / "settings.toml")
    set_rounds(path, rounds)
    try:
        yield
    except BaseException:
        atomic_write(path / "settings.toml", before)
        raise
