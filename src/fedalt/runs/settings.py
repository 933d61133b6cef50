"""The settings of a run: one TOML file, and flags over it, to frozen dataclasses checked once."""

import difflib
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from fedalt.data.encodings import EncodingError, decoded
from fedalt.engine.firewall import Firewall
from fedalt.engine.schedule import Schedule
from fedalt.evaluation import Scoring
from fedalt.methods import METHODS
from fedalt.methods.contract import AnyMethod
from fedalt.methods.lora import Lora
from fedalt.models.base import BUILT_IN, PACKAGED, Quantise
from fedalt.training.group import Training
from fedalt.training.recommended import recommended

Table = Mapping[str, Any]
_DEFAULT = "default"  # targets that are PEFT's own, said in so many words


class SettingsError(ValueError):
    """Settings that cannot be used; the text names the file, the key and what was expected."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the client data lie and how they become examples.

    `template` is a file; `max_length` is in tokens; `validation` is the share of a client's train
    records held out where it has no validation file; `client_field` names the client column of a
    single file; `cut_answers` allows to cut an answer that is too long for `max_length`.
    """

    path: Path
    template: Path | None = None
    max_length: int = 512
    validation: float = 0.1
    client_field: str | None = None
    cut_answers: bool = False

    def __post_init__(self) -> None:
        # The data are checked for this too, but only after the base model has been loaded.
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation={self.validation}, but it is at least 0 and below 1")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}, but an example has at least 2 tokens")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model: a folder, a hub id, "tiny" or "minilm"; `targets` are its sites.

    Without `targets`, or with "default", the sites are those that PEFT adapts by default;
    "all-linear" are all, and a list names endings of module paths. Without `device` a GPU is used
    where there is one.
    """

    name: str = BUILT_IN
    targets: tuple[str, ...] | str | None = None
    quantise: Quantise | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.targets == _DEFAULT:
            object.__setattr__(self, "targets", None)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides a run's numbers; `yardstick` trains every client alone beside the method."""

    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    method: AnyMethod = field(default_factory=lambda: METHODS["fedalt"])
    training: Training = field(default_factory=Training)
    rounds: Schedule = field(default_factory=Schedule)
    scoring: Scoring = field(default_factory=Scoring)
    firewall: Firewall = field(default_factory=Firewall)
    seed: int = 0
    yardstick: bool = True


# Every section that is built from its class alone; [method] depends on the method's name.
_SECTIONS: Mapping[str, type] = {
    "data": DataSettings,
    "model": ModelSettings,
    "training": Training,
    "rounds": Schedule,
    "scoring": Scoring,
    "firewall": Firewall,
}
_TOP: Mapping[str, type] = {"seed": int, "yardstick": bool}


def read_settings(file: Path | None, flags: Table | None = None) -> Settings:
    """The settings of a file with flags over it, either of which may be absent.

    `flags` is a table like the file's. Paths are relative to the file's folder, those of flags to
    the current one. Raises SettingsError.
    """
    return settings_of(*_joined(file, flags or {}))


def advised_settings(file: Path | None, flags: Table | None = None) -> tuple[Settings, str]:
    """The same with what the base model recommends for all that neither says.

    Also a sentence about that, "" where nothing was added. Only for what a user writes: the
    settings in a run's folder are whole.
    """
    written = read_settings(file, flags)  # so that an error is about what the user has written
    table, source = _joined(file, flags or {})
    filled, sentence = recommended(table)
    return settings_of(filled, source) if sentence else written, sentence


def _joined(file: Path | None, flags: Table) -> tuple[dict[str, Any], str]:
    """A file's table with flags over it, and what errors call the two."""
    merged = {} if file is None else read_table(file)
    flags = rooted(flags, Path())
    for key, value in flags.items():
        below = merged.get(key, {})
        merged[key] = {**below, **value} if isinstance(value, dict) and _is_table(below) else value
    sources = ([str(file)] if file else []) + (["the command line"] if flags else [])
    return merged, " and ".join(sources) or "the settings"


def read_table(file: Path) -> dict[str, Any]:
    """What a file of settings says, unchecked, with its relative paths made absolute."""
    return rooted(_parse(file), file.parent)


def settings_of(table: Table, source: str) -> Settings:
    """Check a table of settings whose paths are absolute; errors begin with `source`."""
    unknown = table.keys() - _SECTIONS.keys() - _TOP.keys() - {"method"}
    if unknown:
        known = (*_TOP, *(f"[{section}]" for section in (*_SECTIONS, "method")))
        raise SettingsError(f"{source}: {_unknown(min(unknown), known, '')}")
    for section in (*_SECTIONS, "method"):
        if not _is_table(table.get(section, {})):
            got = _shown(table[section])
            raise SettingsError(f"{source}: [{section}]: expected a section, got {got}")
    if "path" not in table.get("data", {}):
        raise SettingsError(f"{source}: [data] path is missing: the folder of the client data")
    given = {key: hint for key, hint in _TOP.items() if key in table}
    top = {key: _typed(table[key], hint, f"{source}: {key}") for key, hint in given.items()}
    sections = {
        name: section_of(cls, table.get(name, {}), source, name) for name, cls in _SECTIONS.items()
    }
    settings = Settings(method=_method(table.get("method", {}), source), **sections, **top)
    if settings.rounds.robust is not None and not settings.method.averages:
        able = ", ".join(name for name, method in METHODS.items() if method.averages)
        raise SettingsError(
            f"{source}: [rounds] robust: {method_name(settings.method)!r} does more with uploads "
            f"than to average them; methods that only do that are {able}"
        )
    return settings


def to_toml(settings: Settings) -> str:
    """The settings with all their defaults written out; reading them gives the same settings."""
    own = {name: getattr(settings.method, name) for name in settings_of_method(settings.method)}
    method = {"name": method_name(settings.method), **asdict(lora_of(settings.method)), **own}
    sections = {name: asdict(getattr(settings, name)) for name in _SECTIONS}
    # Left out, it would be what the base model recommends when the file is run again.
    sections["model"]["targets"] = settings.model.targets or _DEFAULT
    top = {name: getattr(settings, name) for name in _TOP}
    table = {**top, **sections, "method": method}
    return tomli_w.dumps({key: _plain(value) for key, value in table.items()})


def method_name(method: AnyMethod) -> str:
    """The name under which METHODS lists a method."""
    return METHODS.name_of(method)


def settings_of_method(method: AnyMethod) -> tuple[str, ...]:
    """The names of a method's own settings."""
    own: Any = fields(method)  # type: ignore[arg-type]  # the protocol hides the dataclass
    return tuple(each.name for each in own if each.name not in ("lora", "variant"))


def lora_of(method: AnyMethod) -> Lora:
    """The size of a method's adapters."""
    lora: Lora = vars(method)["lora"]
    return lora


def _parse(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decoded(file.read_bytes()))
    except FileNotFoundError:
        raise SettingsError(f"{file}: there is no such settings file") from None
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, EncodingError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from None


def rooted(table: Table, root: Path) -> dict[str, Any]:
    """A table of settings with paths relative to `root` made absolute; a hub id is no path."""
    whole = {key: dict(value) if _is_table(value) else value for key, value in table.items()}
    if isinstance(methods := table.get("methods"), list):  # a comparison's, each like a table
        whole["methods"] = [rooted(each, root) if _is_table(each) else each for each in methods]
    places = (("data", "path"), ("data", "template"), ("model", "name"))
    for section, key in places:
        part = whole.get(section)
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(value, str | Path) or str(value) in ("", BUILT_IN, *PACKAGED):
            continue
        path = Path(os.path.abspath(root / Path(value).expanduser()))  # noqa: PTH100 - keeps links
        if section == "data" or path.is_dir() or str(value).startswith((".", "~")):
            whole[section] = {**whole[section], key: str(path)}
    return whole


def section_of(cls: Any, table: Table, source: str, section: str) -> Any:
    """A dataclass from the part of a table that names its fields. Raises SettingsError."""
    place, hints = f"{source}: [{section}]", get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    if unknown := table.keys() - set(known):
        raise SettingsError(f"{place}: {_unknown(min(unknown), known, section)}")
    values = {key: _typed(value, hints[key], f"{place} {key}") for key, value in table.items()}
    return _made(cls, values, place)


def _method(table: Table, source: str) -> AnyMethod:
    """The method that a section names, with its low-rank size and its own fields."""
    place = f"{source}: [method]"
    name = _typed(table.get("name", "fedalt"), str, f"{place} name")
    if name not in METHODS:
        hint = _close(name, METHODS)
        raise SettingsError(
            f"{place} name: there is no method {name!r}, only {', '.join(METHODS)}{hint}"
        )
    own, sizes = METHODS.entries[name].settings.keys(), {f.name for f in fields(Lora)}
    unknown = table.keys() - own - sizes - {"name"}
    if unknown:
        text = _unknown(min(unknown), (*sorted(sizes), *sorted(own)), "method")
        raise SettingsError(f"{place}: {text} (method {name!r})")
    lora = section_of(Lora, {key: table[key] for key in table.keys() & sizes}, source, "method")
    default: Any = METHODS.entries[name].method(table.keys() & own)
    hints = get_type_hints(type(default))
    values = {key: _typed(table[key], hints[key], f"{place} {key}") for key in table.keys() & own}
    method: AnyMethod = _made(partial(replace, default), {"lora": lora, **values}, place)
    return method


def _made(cls: Any, values: Table, place: str) -> Any:
    try:
        return cls(**values)
    except ValueError as error:
        raise SettingsError(f"{place}: {error}") from error


def _typed(value: object, hint: Any, place: str) -> Any:
    """The value as its declared type, or an error; a whole number will do for a real one."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        typed = _as(value, option)
        if typed is not None:
            return typed
    words = [_words(option) for option in options if option is not NoneType]
    close = _close(value, [name for option in options for name in get_args(option)])
    raise SettingsError(f"{place}: expected {' or '.join(words)}, got {_shown(value)}{close}")


def _as(value: object, hint: Any) -> Any:
    """The value as one plain type, or None."""
    match value:
        case bool():
            return value if hint is bool else None
        case int():
            return value if hint is int else float(value) if hint is float else None
        case float():
            return value if hint is float and math.isfinite(value) else None
        case str() if get_origin(hint) is Literal:
            return value if value in get_args(hint) else None
        case str():
            return hint(value) if hint in (str, Path) and value else None
        case dict() if get_origin(hint) is Mapping:
            of = {str(key): _as(each, get_args(hint)[1]) for key, each in value.items()}
            return None if None in of.values() else of
        case list() if get_origin(hint) is tuple and all(isinstance(each, str) for each in value):
            return tuple(value) if value else None
        case _:
            return None


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list of names"
    if get_origin(hint) is Mapping:
        return f"a table of names, each with {_words(get_args(hint)[1])}"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        Path: "a path",
    }[hint]


def _unknown(key: str, known: Iterable[str], section: str) -> str:
    """What to say of a key that its section does not have."""
    homes = {name: [f.name for f in fields(cls)] for name, cls in _SECTIONS.items()}
    homes["method"] = [f.name for f in fields(Lora)]
    elsewhere = [f"[{name}]" for name, keys in homes.items() if key in keys and name != section]
    if key in _TOP:
        return f"unknown key {key!r}; it belongs at the top of the file, before any section"
    if elsewhere:
        return f"unknown key {key!r}; it belongs in {' or '.join(elsewhere)}"
    hint = _close(key, known)
    return f"unknown key {key!r}{hint or '; expected one of ' + ', '.join(known)}"


def _close(value: object, known: Iterable[str]) -> str:
    names = [name for name in known if isinstance(name, str)]
    found = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _plain(value: Any) -> Any:
    """A value that TOML can hold; what is absent is left out."""
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items() if each is not None}
        case tuple():
            return list(value)
        case Path():
            return str(value)
        case _:
            return value


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
