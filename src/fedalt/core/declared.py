"""Settings are declared once: a field has its type, default, range and one sentence of help.

    @declared
    class Schedule:
        rounds: Annotated[int, setting("Number of rounds.", ge=1)] = 20

How TOML is checked, the flags, their help and the documents' table of settings follow from that.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
)

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")
_STRICT: Final = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1, arbitrary_types_allowed=True
)
_LONGEST: Final = 60  # characters of a value in an error
_LIMITS: Final = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_OUT_OF_RANGE: Final = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_WORDS: Final[Mapping[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    Path: "a path",
}


class SettingsError(ValueError):
    """Settings that cannot be used; the text names the file, the key and what was expected."""


def setting(text: str, *, flag: str | None = "", **limits: Any) -> Any:
    """The help and the limits (`gt`, `ge`, `lt`, `le`) of a setting.

    `flag` is its name on the command line, "" for the field's own name, None for TOML only.
    """
    return Field(description=text, json_schema_extra={"flag": flag}, **limits)


class Declared(NamedTuple):
    """One setting as declared; `default` is MISSING where a value must be given."""

    name: str
    hint: Any
    default: Any
    help: str
    flag: str | None
    limits: str

    @property
    def types(self) -> tuple[Any, ...]:
        """The types that a value may have, None left out."""
        return tuple(option for option in options_of(self.hint) if option is not NoneType)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def declared(cls: type[T]) -> type[T]:
    """A frozen dataclass whose values are checked; SettingsError says in a sentence what is wrong.

    A whole number will do for a real one, and a list for a tuple; nothing else is converted.
    """
    checked: Any = dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)
    validate = checked.__init__

    def __init__(self: T, **values: Any) -> None:  # noqa: N807 - it takes the place of one
        try:
            validate(self, **values)
        except ValidationError as error:
            raise SettingsError(_sentence(checked, error, values)) from None

    checked.__init__ = __init__
    return checked  # type: ignore[no-any-return]


def declared_in(cls: Any) -> Iterator[Declared]:
    """The settings of a class in their order, sections left out."""
    for name, info in cls.__pydantic_fields__.items():
        if info.description is None:
            continue
        default = MISSING if info.is_required() else info.get_default(call_default_factory=True)
        extra: Any = info.json_schema_extra or {"flag": ""}
        flag = extra["flag"]
        if flag == "":
            flag = "--" + name.replace("_", "-")
        yield Declared(name, info.annotation, default, info.description, flag, _limits_of(info))


def section_of(cls: Any, table: Mapping[str, Any], source: str, section: str) -> Any:
    """A declared class from the table of a section. Raises SettingsError."""
    place = f"{source}: [{section}]"
    known = [item.name for item in fields(cls)]
    if unknown := table.keys() - set(known):
        raise SettingsError(f"{place}: unknown key {min(unknown)!r}{hint_of(min(unknown), known)}")
    return placed(cls, table, place)


def placed(cls: Any, values: Mapping[str, Any], place: str) -> Any:
    """An instance of a class; its SettingsError begins with the place."""
    try:
        return cls(**values)
    except ValueError as error:
        text = str(error)
        keys = getattr(cls, "__pydantic_fields__", ())
        about_key = any(text.startswith((f"{key}: ", f"{key} is ")) for key in keys)
        raise SettingsError(f"{place}{' ' if about_key else ': '}{text}") from None


def typed(value: object, hint: Any, place: str) -> Any:
    """A value as its declared type. Raises SettingsError that begins with the place."""
    try:
        return TypeAdapter(hint, config=_STRICT).validate_python(value)
    except ValidationError:
        raise SettingsError(f"{place}: {_expected(hint, value)}") from None


def hint_of(key: str, known: Iterable[str]) -> str:
    """What a misspelt key may have meant."""
    names = list(known)
    return close_to(key, names) or "; expected one of " + ", ".join(names)


def close_to(value: object, known: Iterable[object]) -> str:
    """The known name that is nearest to a misspelt one, as the end of a sentence."""
    names = [name for name in known if isinstance(name, str)]
    close = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def options_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type, without what is annotated to them."""
    if get_origin(hint) is Annotated:
        return options_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for option in get_args(hint) for part in options_of(option))
    return (hint,)


def words_of(hint: Any) -> str:
    """One type in plain words."""
    match get_origin(hint), get_args(hint):
        case origin, names if origin is Literal:
            return "one of " + ", ".join(map(repr, names))
        case origin, _ if origin is tuple:
            return "a list of names"
        case _, (_, value) if get_origin(hint) is not Literal:
            return f"a table of names, each with {words_of(value)}"
    return _WORDS[hint]


def shown(value: object) -> str:
    """A value as TOML has it."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _sentence(cls: Any, error: ValidationError, values: Mapping[str, Any]) -> str:
    """The first mistake of a declared class."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    info = cls.__pydantic_fields__.get(name)
    if info is None:
        return f"unknown key {name!r}{hint_of(name, cls.__pydantic_fields__)}"
    if name not in values:
        return f"{name} is missing: {info.description}".rstrip(".")
    options = options_of(info.annotation)
    if first["type"] in _OUT_OF_RANGE and len(first["loc"]) == 1:
        value = float(values[name]) if float in options else values[name]
        return f"{name}={value}, but it {_must(_limits_of(info))}"
    return f"{name}: {_expected(info.annotation, values[name])}"


def _expected(hint: Any, value: object) -> str:
    options = [option for option in options_of(hint) if option is not NoneType]
    close = close_to(value, [name for option in options for name in get_args(option)])
    return f"expected {' or '.join(map(words_of, options))}, got {shown(value)}{close}"


def _limits_of(info: Any) -> str:
    """The range of a number in words, "" without any."""
    return " and ".join(
        f"{word} {getattr(limit, name):g}"
        for limit in info.metadata
        for name, word in _LIMITS.items()
        if isinstance(getattr(limit, name, None), int | float)
        and math.isfinite(getattr(limit, name))
    )


def _must(limits: str) -> str:
    """A range as the end of a sentence."""
    if limits == "at least 0":
        return "cannot be negative"
    return f"{'is' if ' and ' in limits or limits.startswith('at') else 'must be'} {limits}"
