"""Whether a run's folder has been begun with the settings and data that somebody names now."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fedalt.runs.folder import RunFolder, StoreError
from fedalt.runs.settings import Settings, read_settings, settings_of, to_toml
from fedalt.runs.settings_file import rooted

Tables = dict[str, Any]  # section: {key: value}; what is not in a section stands by itself

# Places, and what changes speed and rounding only.
_LEFT_OUT: Final[Mapping[str, tuple[str, ...]]] = {
    "data": ("path", "template", "client_column", "prompt_column", "answer_column"),
    "model": ("name", "device"),
    "training": ("processes", "pass_tokens", "gradient_checkpointing"),
    "rounds": ("test",),
    "scoring": ("base", "batch_size"),
    "firewall": ("quarantine_bytes",),
}

# What does not change which numbers a state holds, or where the rest of a run is up to the user.
_FREE: Final = (
    *("training", "rounds", "scoring", "firewall"),
    *("data.path", "data.template", "model.name", "model.device"),
)


def settings_table(settings: Settings) -> dict[str, Any]:
    """Settings as the table that their file holds."""
    return tomllib.loads(to_toml(settings))


def settings_of_run(folder: RunFolder) -> tuple[Settings, tuple[str, ...]]:
    """A run's settings, and a sentence for each that is another than when the run began.

    Rates, lengths and places may change while a run goes on; StoreError for what may not.
    """
    file = folder.path / "settings.toml"
    settings = read_settings(file)
    told = []
    begun = _begun(folder.path, folder.facts())
    for place, before, now in _differences(settings_table(begun), settings_table(settings)):
        what = f"{_called(place)} was {before!r} when the run began, and is {now!r}"
        if place[0] not in _FREE and ".".join(place) not in _FREE:
            raise StoreError(f"{file} was changed: {what}; put it back, or begin a new run")
        told.append(f"{file} was changed: {what}")
    return settings, tuple(told)


def require_settings(path: Path, settings: Settings, free: Iterable[tuple[str, str]] = ()) -> None:
    """Refuse a run's folder with other settings; those that are `free` may differ. StoreError."""
    # What the version that began the run did not know is at its default in both.
    then = settings_table(read_settings(path / "settings.toml"))
    for place, before, now in _differences(then, settings_table(settings)):
        if place not in free:
            raise StoreError(
                f"{path} was run with other settings: {_called(place)} was {before!r}, "
                f"but is {now!r} now; take another --out"
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
    then, now = that_count(_begun(path, facts)), that_count(settings)
    for place, before, after in _differences(then, now):
        if place != ("rounds", "rounds"):
            raise StoreError(
                f"{path} was changed while it ran: {_called(place)} was {before!r} when it began, "
                f"and is {after!r} now; take another --out, or delete that folder"
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


def _begun(path: Path, facts: Mapping[str, Any]) -> Settings:
    """What a run began with; settings that its version did not know had their defaults."""
    return settings_of(rooted(facts.get("settings", {}), path), str(path / "run.json"))


def _differences(then: Tables, now: Tables) -> Iterator[tuple[tuple[str, str], object, object]]:
    """Every (section, key) whose values differ, with both; the key is "" at the top of a file."""
    before, after = _by_place(then), _by_place(now)
    for place in sorted({*before, *after}):
        if before.get(place) != after.get(place):
            yield place, before.get(place), after.get(place)


def _by_place(tables: Tables) -> dict[tuple[str, str], object]:
    return {
        (section, key): value
        for section, table in tables.items()
        for key, value in (table.items() if isinstance(table, dict) else (("", table),))
    }


def _called(place: tuple[str, str]) -> str:
    section, key = place
    return f"[{section}] {key}" if key else section
