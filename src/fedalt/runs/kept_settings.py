"""Whether a run's folder has been begun with the settings that somebody names now."""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedalt.runs.folder import StoreError
from fedalt.runs.settings import Settings, read_table, to_toml


def settings_table(settings: Settings) -> dict[str, Any]:
    """Settings as the table that their file holds."""
    return tomllib.loads(to_toml(settings))


def require_settings(path: Path, settings: Settings, free: Iterable[tuple[str, str]] = ()) -> None:
    """Refuse a run's folder with other settings; those that are `free` may differ. StoreError."""
    then, now = read_table(path / "settings.toml"), settings_table(settings)
    for section, key in free:
        for table in (then, now):
            table.get(section, {}).pop(key, None)
    for section in sorted({*then, *now}):
        if then.get(section) != now.get(section):
            raise StoreError(
                f"{path} was run with other settings: [{section}] was "
                f"{then.get(section)}, but is {now.get(section)} now; take another --out"
            )
