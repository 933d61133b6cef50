"""Files read with one sentence for whatever is wrong with them, which names the file.

JSON is checked against a declared form before anyone uses it: a type such as `dict[str, int]`, or
a TypedDict, whose unknown keys are let through.
"""

import errno
import json
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

SEAL: Final = "sha256"  # the key that holds the digest of all the others


class StoreError(ValueError):
    """A folder that cannot be used, and why; the text names the file."""


class PassingError(StoreError):
    """What may be over by itself, such as a full disk: the same command may work a while later."""


class FormError(ValueError):
    """A value that is not of its declared form; the text says where, and what was expected."""


def require_no_pipe(file: Path) -> None:
    """Raise OSError for a pipe, on which a reader would wait for ever."""
    if file.is_fifo():
        raise OSError(errno.EINVAL, "it is a pipe, not a file", str(file))


def content(file: Path) -> bytes:
    """The content of a file. Raises OSError."""
    require_no_pipe(file)
    return file.read_bytes()


def read_bytes(file: Path) -> bytes:
    """The content of a file. Raises StoreError where it is missing or cannot be read."""
    try:
        return content(file)
    except FileNotFoundError:
        raise StoreError(f"{file} is missing") from None
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from None


def read_text(file: Path) -> str:
    """The text of a file. Raises StoreError."""
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise StoreError(f"{file} is damaged: it is no text ({error})") from None


def read_json(file: Path, form: Any) -> Any:
    """What a JSON file holds, of this form. Raises StoreError."""
    try:
        return parse(read_text(file), form)
    except FormError as error:
        raise StoreError(f"{file} is damaged: {error}") from None


def read_lines(file: Path, form: Any) -> list[Any]:
    """The values of a file with a JSON text in each line, all of this form.

    Raises StoreError, which has the line's number.
    """
    lines = read_bytes(file).split(b"\n")
    values = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            values.append(parse(line.decode(), form))
        except UnicodeDecodeError as error:
            raise StoreError(f"{file} is damaged: line {number}: no text ({error})") from None
        except FormError as error:
            raise StoreError(f"{file} is damaged: line {number}: {error}") from None
    return values


def parse(text: str, form: Any) -> Any:
    """The value of a JSON text. Raises FormError where it is none, or not of this form."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise FormError("it is nested deeper than anything that was written") from None
    except ValueError as error:
        raise FormError(f"it is not JSON ({error})" if text.strip() else "it is empty") from None
    require(value, form)
    return value


def require(value: object, form: Any, where: str = "") -> None:
    """Raise FormError unless a value that JSON can hold is of the declared form."""
    if form is Any:
        return
    origin, args = get_origin(form), get_args(form)
    if origin in (Union, UnionType):
        if not any(_fits(value, each) for each in args):
            raise _mismatch(value, form, where)
    elif origin is Literal:
        if not any(type(each) is type(value) and each == value for each in args):
            raise _mismatch(value, form, where)
    elif is_typeddict(form):
        _require_fields(value, form, where)
    elif origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(value, form, where)
        for key, each in value.items():
            require(each, args[1], f"{where}{key}: ")
    elif origin is list:
        if not isinstance(value, list):
            raise _mismatch(value, form, where)
        for number, each in enumerate(value):
            require(each, args[0], f"{where}{number}: ")
    elif origin is tuple:
        if not isinstance(value, list) or len(value) != len(args):
            raise _mismatch(value, form, where)
        for number, (each, hint) in enumerate(zip(value, args, strict=True)):
            require(each, hint, f"{where}{number}: ")
    elif not (type(value) is form or (form is float and type(value) is int)):
        raise _mismatch(value, form, where)


def sealed(content: dict[str, Any]) -> bytes:
    """A JSON object as the bytes of a file that shows every change made to it."""
    return (json.dumps({**content, SEAL: seal_of(content)}, allow_nan=False) + "\n").encode()


def read_sealed(file: Path, form: Any) -> dict[str, Any]:
    """What `sealed` made the bytes of, of this form, or StoreError."""
    value: dict[str, Any] = read_json(file, form)
    seal = value.pop(SEAL, None)
    if seal is None:
        raise StoreError(f"{file} is damaged: it lacks {SEAL!r}")
    if seal != seal_of(value):
        raise StoreError(f"{file} was changed after it was written: its {SEAL} does not fit")
    return value


def seal_of(content: dict[str, Any]) -> str:
    """The digest of an object, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()


def _require_fields(value: object, form: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise _mismatch(value, form, where)
    if missing := form.__required_keys__ - value.keys():
        raise FormError(f"{where}it lacks {min(missing)!r}")
    for key, hint in _hints(form).items():
        if key in value:
            require(value[key], hint, f"{where}{key}: ")


@cache
def _hints(form: Any) -> dict[str, Any]:
    return get_type_hints(form)


def _fits(value: object, form: Any) -> bool:
    try:
        require(value, form)
    except FormError:
        return False
    return True


def _mismatch(value: object, form: Any, where: str) -> FormError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return FormError(f"{where}expected {_words(form)}, got {shown}")


def _words(form: Any) -> str:
    origin, args = get_origin(form), get_args(form)
    if origin in (Union, UnionType):
        return " or ".join(_words(option) for option in args)
    if origin is Literal:
        return " or ".join(json.dumps(option) for option in args)
    if origin in (list, tuple):
        return "a list" if origin is list else f"a list of {len(args)}"
    if origin is dict or is_typeddict(form):
        return "an object"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return "null" if form is NoneType else plain[form]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
