"""A run's folder is begun: a new one, or one whose process was killed before it was a run."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from fedalt.core.files import atomic_write, is_unfinished, make_private_folder
from fedalt.core.reading import StoreError, read_text
from fedalt.runs.folder import RunFolder
from fedalt.runs.record import FORMAT
from fedalt.runs.standing import FACTS, LISTS, PROGRESS, RECORD, write_facts

_SETTINGS = "settings.toml"


def require_unused(path: Path, settings: str) -> None:
    """Refuse a folder for a new run that holds anything already.

    But for what one with these settings has left that was killed before it was a run.
    """
    if not path.exists():
        return
    if path.is_dir() and all(_is_of_beginning(entry, settings) for entry in path.iterdir()):
        return
    hint = ""
    if (path / FACTS).exists():
        hint = f"; `fedalt resume {path}` continues it"
    elif any((path / name).exists() for name in (PROGRESS, RECORD, *LISTS)):
        hint = f": it holds a run whose {path / FACTS} is missing"
    raise StoreError(f"{path} exists already and is not empty{hint}")


def create(path: Path, settings: str, facts: Mapping[str, object]) -> RunFolder:
    """Make a run's folder; one that is in use is refused as by `require_unused`.

    run.json comes last and makes a run of it: before, nothing can have been trained.
    """
    require_unused(path, settings)
    make_private_folder(path)
    for entry in filter(is_unfinished, path.iterdir()):
        entry.unlink()
    begun = path / _SETTINGS
    atomic_write(begun, settings.encode())
    whole = {"format": FORMAT, **facts, "settings": tomllib.loads(settings)}
    try:
        write_facts(path, whole)
    except BaseException:  # other settings may begin here, too
        begun.unlink()
        raise
    return RunFolder(path)


def _is_of_beginning(file: Path, settings: str) -> bool:
    """Whether a run with these settings writes this file before it is one."""
    if file.name == _SETTINGS:
        return file.is_file() and read_text(file) == settings
    return file.name == ".lock" or is_unfinished(file)
