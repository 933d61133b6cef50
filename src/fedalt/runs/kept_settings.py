"""Whether a run's folder has been begun with the settings and data that somebody names now."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from fedalt.runs.folder import StoreError
from fedalt.runs.settings import Settings, read_settings, settings_of, to_toml
from fedalt.runs.settings_file import rooted

Tables = dict[str, dict[str, Any]]

# Places, and what changes speed and rounding only.
_LEFT_OUT: Final[Mapping[str, tuple[str, ...]]] = {
    "data": ("path", "template", "client_column", "prompt_column", "answer_column"),
    "model": ("name", "device"),
    "training": ("processes", "pass_tokens", "gradient_checkpointing"),
    "rounds": ("test",),
    "scoring": ("base", "batch_size"),
    "firewall": ("quarantine_bytes",),
}


def settings_table(settings: Settings) -> dict[str, Any]:
    """Settings as the table that their file holds."""
    return tomllib.loads(to_toml(settings))


def require_settings(path: Path, settings: Settings, free: Iterable[tuple[str, str]] = ()) -> None:
    """Refuse a run's folder with other settings; those that are `free` may differ. StoreError."""
    # What the version that began the run did not know is at its default in both.
    then, now = settings_table(read_settings(path / "settings.toml")), settings_table(settings)
    for section, key in free:
        for table in (then, now):
            table.get(section, {}).pop(key, None)
    for section in sorted({*then, *now}):
        if then.get(section) != now.get(section):
            raise StoreError(
                f"{path} was run with other settings: [{section}] was "
                f"{then.get(section)}, but is {now.get(section)} now; take another --out"
            )


def that_count(settings: Settings, prints: Mapping[str, Mapping[str, Any]] | None = None) -> Tables:
    """The settings by section without those that change no number, and with these fingerprints."""
    return {
        section: {
            **{key: value for key, value in table.items() if key not in _LEFT_OUT.get(section, ())},
            **(prints or {}).get(section, {}),
        }
        for section, table in settings_table(settings).items()
        if isinstance(table, dict)  # what is not is the seed, and the baseline that no cell has
    }


def require_unchanged(path: Path, facts: Mapping[str, Any], settings: Settings) -> None:
    """Refuse a run that did not begin with these settings, as far as they count. StoreError.

    `facts` are those of its run.json. Its length may have changed since, and nothing else: rounds
    of two learning rates are nobody's.
    """
    begun = settings_of(rooted(facts.get("settings", {}), path), str(path / "run.json"))
    then, now = that_count(begun), that_count(settings)
    for table in (then, now):
        table["rounds"].pop("rounds")
    for section in sorted({*then, *now}):
        before, after = then.get(section, {}), now.get(section, {})
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                raise StoreError(
                    f"{path} was changed while it ran: [{section}] {key} was {before.get(key)} "
                    f"when it began, and is {after.get(key)} now; take another --out, or delete "
                    "that folder"
                )


def require_same_data(
    path: Path, facts: Mapping[str, Any], fingerprint: str, template: str
) -> None:
    """Refuse a run that began with other client data or another template. StoreError.

    `facts` are those of its run.json.
    """
    for key, found, what in (
        ("fingerprint", fingerprint, "other client data"),
        ("template", template, "another prompt template"),
    ):
        if (expected := facts.get("data", {}).get(key)) != found:
            raise StoreError(
                f"{path / 'run.json'}: the run began with {what}: expected {key} {expected!r}, "
                f"found {found!r}"
            )
