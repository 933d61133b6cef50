"""The settings of a run: one TOML file, and flags over it, checked once against declarations."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, get_type_hints

import tomli_w

from fedalt.core.declared import (
    Declared,
    SettingsError,
    close_to,
    declared,
    declared_in,
    hint_of,
    placed,
    section_of,
    setting,
    shown,
    typed,
)
from fedalt.core.settings import (
    DEFAULT_TARGETS,
    DataSettings,
    ModelSettings,
    Schedule,
    Scoring,
    Stay,
    Training,
)
from fedalt.core.upload_settings import Firewall, Privacy, Traffic
from fedalt.methods import METHODS, RENAMED
from fedalt.methods.lora import Lora
from fedalt.runs.settings_file import read_table as read_table
from fedalt.runs.settings_file import rooted
from fedalt.runs.together import require_together

if TYPE_CHECKING:
    from fedalt.methods.contract import AnyMethod
else:  # a method's class needs torch, which whoever only looks at settings does without
    AnyMethod = Any

__all__ = ["DataSettings", "ModelSettings", "SettingsError"]

Table = Mapping[str, Any]
_METHOD: Final = "fedalt"


@declared
class Settings:
    """Everything that decides the numbers of a run."""

    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    method: AnyMethod = field(default_factory=lambda: METHODS[_METHOD])
    training: Training = field(default_factory=Training)
    rounds: Schedule = field(default_factory=Schedule)
    scoring: Scoring = field(default_factory=Scoring)
    firewall: Firewall = field(default_factory=Firewall)
    privacy: Privacy = field(default_factory=Privacy)
    traffic: Traffic = field(default_factory=Traffic)
    clients: Mapping[str, Stay] = field(default_factory=dict)
    seed: Annotated[int, setting("Random seed.")] = 0
    local_baseline: Annotated[
        bool, setting("Also train every client alone: the local-only baseline.")
    ] = True


@declared
class _MethodName:
    """The key of [method] that names the method."""

    name: Annotated[
        str, setting("Federated method; `fedalt methods` lists them.", flag="--method")
    ] = _METHOD


# Every section that is built from its class alone; [method] depends on the method's name.
_SECTIONS: Final[Mapping[str, Any]] = {
    "data": DataSettings,
    "model": ModelSettings,
    "training": Training,
    "rounds": Schedule,
    "scoring": Scoring,
    "firewall": Firewall,
    "privacy": Privacy,
    "traffic": Traffic,
}
_CLIENTS: Final = "clients"  # of which every client may have a section of its own
_TOP: Final = {item.name: item for item in declared_in(Settings)}
_LORA: Final = tuple(item.name for item in declared_in(Lora))


def all_declared() -> Iterator[tuple[str, Declared]]:
    """Every setting with its section, "" for the top of the file; of [method] what all share."""
    yield from (("data", item) for item in declared_in(DataSettings))
    yield from (("model", item) for item in declared_in(ModelSettings))
    yield from (("method", item) for cls in (_MethodName, Lora) for item in declared_in(cls))
    yield from (("", item) for item in _TOP.values())
    for section in ("training", "rounds", "scoring", "firewall", "privacy", "traffic"):
        yield from ((section, item) for item in declared_in(_SECTIONS[section]))
    yield from ((f"{_CLIENTS}.NAME", item) for item in declared_in(Stay))


def read_settings(file: Path | None, flags: Table | None = None) -> Settings:
    """The settings of a file with flags over it, either of which may be absent.

    `flags` is a table like the file's. Paths are relative to the file's folder, those of flags to
    the current one. Raises SettingsError.
    """
    return settings_of(*_joined(file, flags or {}))


def advised_settings(file: Path | None, flags: Table | None = None) -> tuple[Settings, str]:
    """The same, with what the base model recommends for every setting that neither gives.

    Also a sentence about that, "" where nothing was added. Only for what a user writes: the
    settings in a run's folder are complete.
    """
    from fedalt.training.recommended import recommended

    written = read_settings(file, flags)  # so that an error is about what the user has written
    table, source = _joined(file, flags or {})
    filled, sentence = recommended(table)
    return settings_of(filled, source) if sentence else written, sentence


def read_whole(file: Path) -> dict[str, Any]:
    """What a file of settings says as a table with all defaults; nothing of torch is imported.

    Checked but for the values of the method's own settings. Raises SettingsError.
    """
    table = read_table(file)
    sections = {name: asdict(_section(name, table.get(name, {}), str(file))) for name in _SECTIONS}
    method = table.get("method", {})
    own = METHODS.entries[_name_of(method, f"{file}: [method]")].settings
    return {**table, **sections, "method": {**asdict(Lora()), **own, **method}}


def settings_of(table: Table, source: str) -> Settings:
    """Check a table of settings whose paths are absolute; errors begin with `source`."""
    sections = (*_SECTIONS, "method", _CLIENTS)
    if unknown := table.keys() - _TOP.keys() - set(sections):
        known = (*_TOP, *(f"[{section}]" for section in sections))
        raise SettingsError(f"{source}: {_unknown(min(unknown), known, '')}")
    for section in sections:
        if not isinstance(part := table.get(section, {}), dict):
            raise SettingsError(f"{source}: [{section}]: expected a section, got {shown(part)}")
    top = {
        key: typed(table[key], item.hint, f"{source}: {key}")
        for key, item in _TOP.items()
        if key in table
    }
    parts = {name: _section(name, table.get(name, {}), source) for name in _SECTIONS}
    parts[_CLIENTS] = {
        name: _stay(name, part, source) for name, part in table.get(_CLIENTS, {}).items()
    }
    settings = Settings(method=_method(table.get("method", {}), source), **parts, **top)
    rules = settings.rounds, settings.firewall, settings.privacy, settings.traffic
    require_together(settings.method, settings.training, *rules, settings.clients, source)
    return settings


def to_toml(settings: Settings) -> str:
    """The settings with all their defaults written out; reading them gives the same settings."""
    own = {name: getattr(settings.method, name) for name in settings_of_method(settings.method)}
    method = {"name": method_name(settings.method), **asdict(lora_of(settings.method)), **own}
    sections = {name: asdict(getattr(settings, name)) for name in _SECTIONS}
    # Left out, it would be what the base model recommends when the file is run again.
    sections["model"]["targets"] = settings.model.targets or DEFAULT_TARGETS
    if not settings.privacy.secure_sum:  # so that folders of before it was there stay as they are
        del sections["privacy"]["secure_sum"]
        if settings.privacy.unit is None:
            del sections["privacy"]
    top = {name: getattr(settings, name) for name in _TOP}
    table = {**top, **sections, "method": method}
    if settings.clients:
        table[_CLIENTS] = {name: _plain(asdict(stay)) for name, stay in settings.clients.items()}
    return tomli_w.dumps({key: _plain(value) for key, value in table.items()})


def method_name(method: AnyMethod) -> str:
    """The name under which METHODS lists a method."""
    return METHODS.name_of(method)


def settings_of_method(method: AnyMethod) -> tuple[str, ...]:
    """The names of a method's own settings."""
    own: Any = fields(method)  # type: ignore[arg-type]  # the protocol hides the dataclass
    return tuple(item.name for item in own if item.name not in ("lora", "variant"))


def lora_of(method: AnyMethod) -> Lora:
    """The size of a method's adapters."""
    lora: Lora = vars(method)["lora"]
    return lora


def _joined(file: Path | None, flags: Table) -> tuple[dict[str, Any], str]:
    """A file's table with flags over it, and what errors call the two."""
    merged = {} if file is None else read_table(file)
    flags = rooted(flags, Path())
    for key, value in flags.items():
        below = merged.get(key, {})
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[key] = {**below, **value} if both else value
    sources = ([str(file)] if file else []) + (["the command line"] if flags else [])
    return merged, " and ".join(sources) or "the settings"


def _section(name: str, table: Table, source: str) -> Any:
    """A section's class from its table."""
    known = [item.name for item in declared_in(_SECTIONS[name])]
    if unknown := table.keys() - set(known):
        raise SettingsError(f"{source}: [{name}]: {_unknown(min(unknown), known, name)}")
    return placed(_SECTIONS[name], table, f"{source}: [{name}]")


def _stay(name: str, part: object, source: str) -> Stay:
    """From when until when a client takes part, from its section."""
    section = f"{_CLIENTS}.{name}"
    if not isinstance(part, dict):
        raise SettingsError(f"{source}: [{section}]: expected a section, got {shown(part)}")
    stay: Stay = section_of(Stay, part, source, section)
    return stay


def _method(table: Table, source: str) -> AnyMethod:
    """The method that a section names, with its low-rank size and its own fields."""
    name = _name_of(table, place := f"{source}: [method]")
    entry = METHODS.entries[name]
    own = set(entry.settings)
    if unknown := table.keys() - own - {"name", *_LORA}:
        text = _unknown(min(unknown), (*sorted(_LORA), *sorted(own)), "method")
        raise SettingsError(f"{place}: {text} (method {name!r})")
    lora = placed(Lora, {key: table[key] for key in table.keys() & set(_LORA)}, place)
    default: Any = entry.method(table.keys() & own)
    hints = get_type_hints(type(default))
    values = {key: typed(table[key], hints[key], f"{place} {key}") for key in table.keys() & own}
    try:
        method: AnyMethod = replace(default, lora=lora, **values)
    except ValueError as error:
        raise SettingsError(f"{place}: {error}") from error
    return method


def _name_of(table: Table, place: str) -> str:
    """The name of the method that a section names."""
    name: str = typed(table.get("name", _METHOD), str, f"{place} name")
    if name not in METHODS.entries:
        renamed = f"; it is called {RENAMED[name]} now" if name in RENAMED else ""
        raise SettingsError(
            f"{place} name: there is no method {name!r}, only {', '.join(METHODS)}"
            f"{renamed or close_to(name, METHODS)}"
        )
    return name


def _unknown(key: str, known: tuple[str, ...] | list[str], section: str) -> str:
    """What to say of a key that its section does not have."""
    homes = sorted({f"[{home}]" for home, item in all_declared() if home and item.name == key})
    if key in _TOP:
        return f"unknown key {key!r}; it belongs at the top of the file, before any section"
    if elsewhere := [home for home in homes if home != f"[{section}]" and key != "name"]:
        return f"unknown key {key!r}; it belongs in {' or '.join(elsewhere)}"
    return f"unknown key {key!r}{hint_of(key, known)}"


def _plain(value: Any) -> Any:
    """A value that TOML can hold; what is absent is left out."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    return value
