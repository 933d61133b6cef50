"""States and messages to bytes and back: the same format on disk and on the wire.

The bytes are a safetensors file. A tensor's key is its field, slot, factor and site, joined by
"/"; all that is no tensor is JSON, whose types are those that the dataclass declares. A class is
stored under its `TAG`, a short constant of its own, so that it may be renamed and moved.
"""

import json
import math
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from inspect import formatannotation
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from fedalt.core.container import CodecError as CodecError
from fedalt.core.container import dump, pack, unpack
from fedalt.core.digests import digest_of
from fedalt.core.files import atomic_write as atomic_write
from fedalt.core.tree import Name, Tree

T = TypeVar("T")


def encode(value: object, *, omit: Collection[str] = ()) -> bytes:
    """The bytes of a frozen dataclass of trees, numbers, texts, mappings, tuples and dataclasses.

    `omit` names fields of `value` that are kept elsewhere, such as a ledger. Equal values give
    equal bytes, whatever the order of their trees and mappings. An int in a field declared float
    is written as that float. Gradients, devices and shared memory are not kept.
    """
    cls = type(value)
    tensors: dict[str, Tensor] = {}
    facts = _flatten_fields(cls, value, (), tensors, omit)
    return pack({"class": _label(cls), "facts": dump(facts)}, tensors)


def decode(
    cls: type[T], data: bytes, *, given: Mapping[str, object] | None = None, finite: bool = False
) -> T:
    """The value that `encode` turned into these bytes, or `CodecError`.

    `given` holds the fields that were omitted. With `finite`, NaN and infinity are errors, in
    tensors and in facts. Trees come back sorted by name, on the CPU, in memory of their own.
    """
    texts, tensors = unpack(data)
    if texts.keys() != {"class", "facts"}:
        raise CodecError(f"the metadata are {sorted(texts)} instead of class and facts")
    if texts["class"] != _label(cls):
        raise CodecError(f"these bytes hold a {texts['class']}, but a {_label(cls)} was expected")
    if finite:
        _require_finite(tensors.items())
    source = _Source(tensors, sorted(tensors), finite)
    try:
        value: T = _build(cls, _parse(texts["facts"]), (), source, given or {})
    except RecursionError:
        raise CodecError("the facts are nested deeper than any state") from None
    if tensors:
        raise CodecError(f"{len(tensors)} unexpected tensors, first {min(tensors)}")
    return value


def check_tree(
    tree: Mapping[Name, Tensor],
    shapes: Mapping[Name, tuple[int, ...]],
    *,
    dtype: torch.dtype | None = None,
    finite: bool = False,
    what: str = "the tree",
) -> None:
    """Fail unless the tree has exactly these names and shapes and, where asked, dtype and no NaN.

    `what` opens the text of the error, such as "the upload of client 'a'".
    """
    if missing := shapes.keys() - tree.keys():
        raise CodecError(f"{what} lacks {len(missing)} tensors, first {min(missing)}")
    if extra := tree.keys() - shapes.keys():
        raise CodecError(f"{what} has {len(extra)} unexpected tensors, first {min(extra)}")
    for name in sorted(tree):
        got, wanted = tuple(tree[name].shape), tuple(shapes[name])
        if got != wanted:
            raise CodecError(f"{what}: {name} has shape {got}, but {wanted} was expected")
        if dtype is not None and tree[name].dtype != dtype:
            raise CodecError(f"{what}: {name} is {tree[name].dtype}, but {dtype} was expected")
    if finite:
        _require_finite((f"{what}: {name}", tree[name]) for name in sorted(tree))


def fields_of(cls: type, declared: object) -> tuple[str, ...]:
    """The fields of a dataclass that are declared as this type, such as all ledgers of a state."""
    return tuple(name for name, hint in _hints(cls).items() if hint == declared)


def write(path: Path, value: object, *, omit: Collection[str] = ()) -> str:
    """Encode into a file, which is replaced whole or not at all; the SHA-256 of its bytes."""
    try:
        data = encode(value, omit=omit)
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error
    atomic_write(path, data)
    return digest_of(data)


def read(
    cls: type[T],
    path: Path,
    *,
    given: Mapping[str, object] | None = None,
    finite: bool = False,
    of: Callable[[Path], bytes] = Path.read_bytes,
) -> T:
    """Decode a file; an error about its content begins with its path. `of` reads its bytes."""
    try:
        return decode(cls, of(path), given=given, finite=finite)
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error


def _require_finite(named: Iterable[tuple[str, Tensor]]) -> None:
    for where, tensor in named:
        if tensor.is_floating_point() and not _all_finite(tensor.detach().cpu()):
            raise CodecError(f"{where} holds NaN or infinity")


def _all_finite(tensor: Tensor) -> bool:
    """In numpy, as torch's threads, waiting for each other, take seconds on a busy machine."""
    if tensor.dtype == torch.bfloat16:  # unknown to numpy; an exponent of ones is not finite
        return bool((tensor.view(torch.int16).numpy() & 0x7F80 != 0x7F80).all())
    return bool(np.isfinite(tensor.numpy()).all())


# From here on: a value and its plain form, which is what JSON knows, as its declaration says.

_SCALARS = (bool, int, float, str, NoneType)
_ODD_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers
_EXACT = 2**53  # floats hold every int up to here


class _Source(NamedTuple):
    """Tensors not yet taken, all keys sorted, and whether NaN is an error."""

    tensors: dict[str, Tensor]
    keys: list[str]
    finite: bool


def _label(cls: type) -> str:
    tag = vars(cls).get("TAG")  # its own: a class that inherits one would be taken for another
    if not isinstance(tag, str):
        raise CodecError(f"{cls.__qualname__} has no TAG to be stored under")
    return tag


def _hints(cls: type) -> dict[str, Any]:
    if not is_dataclass(cls):
        raise CodecError(f"{cls.__qualname__} is no dataclass")
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _tag(hint: Any, where: str) -> str:
    """What marks the plain form of a type; "" for those that JSON tells apart by itself."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in _SCALARS or origin in (tuple, Literal):
        return ""
    if origin in (dict, Mapping) and args == (Name, Tensor):
        return "tree"
    if origin in (dict, Mapping) and args[0] is str:
        return "mapping"
    if isinstance(hint, type) and is_dataclass(hint):
        return _label(hint)
    raise CodecError(f"{where} is declared {formatannotation(hint)}, which the codec cannot hold")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _items(hint: Any, count: int) -> tuple[Any, ...]:
    """What the items of a tuple are declared as, if it has `count` of them."""
    args = get_args(hint)
    return args[:1] * count if args[1:] == (Ellipsis,) else args


def _fits(hint: Any, value: object, sequence: type) -> bool:
    """Whether the outermost part is of the declared type; `sequence` stands for tuple."""
    if get_origin(hint) is Literal:
        return any(type(each) is type(value) and each == value for each in get_args(hint))
    if get_origin(hint) is tuple and isinstance(value, (tuple, list)):
        return type(value) is sequence and len(_items(hint, len(value))) == len(value)
    return type(value) is hint


def _holds(hint: Any, value: Any, where: str) -> bool:
    """Whether a value is of the declared type."""
    if (tag := _tag(hint, where)) in ("tree", "mapping"):
        key_type = Name if tag == "tree" else str
        return isinstance(value, Mapping) and all(type(key) is key_type for key in value)
    if hint is float and type(value) is int:
        return abs(value) <= _EXACT
    return _fits(hint, value, tuple)


def _announces(hint: Any, plain: Any, where: str) -> bool:
    """Whether a plain form is that of the declared type."""
    tag = _tag(hint, where)
    content = next(iter(plain.values())) if isinstance(plain, dict) and len(plain) == 1 else None
    if hint is float and content is not None:
        return plain == {"float": content} and str(content) in _ODD_FLOATS
    if tag == "tree":
        return plain == {tag: content} and type(content) is int
    if tag:
        return plain == {tag: content} and isinstance(content, dict)
    return _fits(hint, plain, list)


def _flatten_fields(
    cls: type,
    value: object,
    path: tuple[str, ...],
    tensors: dict[str, Tensor],
    omit: Collection[str] = (),
) -> dict[str, Any]:
    hints = _hints(cls)
    if unknown := set(omit) - hints.keys():
        raise CodecError(f"{_label(cls)} has no field {min(unknown)!r} to omit")
    return {
        name: _flatten(hint, getattr(value, name), (*path, name), tensors)
        for name, hint in hints.items()
        if name not in omit
    }


def _flatten(hint: Any, value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """The plain form of a value; its tensors are put into `tensors`."""
    where = "/".join(path)
    options = [option for option in _options(hint) if _holds(option, value, where)]
    if not options:
        raise CodecError(
            f"{where} is {reprlib.repr(value)}, but {formatannotation(hint)} is declared"
        )
    hint = type(value) if type(value) in options else options[0]
    if hint is float:
        return float(value) if math.isfinite(value) else {"float": str(value)}
    if get_origin(hint) is tuple:
        items = zip(_items(hint, len(value)), value, strict=True)
        return [_flatten(*item, (*path, str(i)), tensors) for i, item in enumerate(items)]
    match _tag(hint, where):
        case "":
            _require_json(value, where)
            return value
        case "tree":
            for name, tensor in value.items():
                key = _key((*path, name.slot, name.factor), name.site)
                _require_json(key, where)
                tensors[key] = tensor
            return {"tree": len(value)}
        case "mapping":
            each = get_args(hint)[1]
            for key in value:
                _require_json(key, where)
            return {"mapping": {k: _flatten(each, value[k], (*path, k), tensors) for k in value}}
        case label:
            return {label: _flatten_fields(hint, value, path, tensors)}


def _key(path: tuple[str, ...], last: str) -> str:
    """The parts of a path joined, after which only `last` may contain the sign that joins them."""
    for part in path:
        if "/" in part:
            raise CodecError(f"{part!r} is part of a tensor's key and must not contain '/'")
    return "/".join((*path, last))


def _require_json(value: object, where: str) -> None:
    try:
        dump(value).encode()
    except ValueError as error:  # half a surrogate pair, an int of thousands of digits
        raise CodecError(f"{where} holds what JSON cannot: {error}") from error


def _parse(text: str) -> Any:
    try:
        plain = json.loads(text)
        if dump(plain) != text:  # such as a key twice
            raise ValueError("they are not as they were written")
    except ValueError as error:
        raise CodecError(f"the facts cannot be read: {error}") from error
    return plain


def _restore(hint: Any, plain: Any, path: tuple[str, ...], source: _Source) -> Any:
    """The value of a plain form; its tensors are taken out of the source."""
    where = "/".join(path)
    options = [option for option in _options(hint) if _announces(option, plain, where)]
    if not options:
        raise CodecError(
            f"{where} is {reprlib.repr(plain)}, but {formatannotation(hint)} is declared"
        )
    hint = options[0]
    if hint is float:
        number = _ODD_FLOATS[plain["float"]] if isinstance(plain, dict) else plain
        if source.finite and not math.isfinite(number):
            raise CodecError(f"{where} is {number}, but a finite number was expected")
        return number
    if get_origin(hint) is tuple:
        items = zip(_items(hint, len(plain)), plain, strict=True)
        return tuple(_restore(*item, (*path, str(i)), source) for i, item in enumerate(items))
    match _tag(hint, where):
        case "":
            return plain
        case "tree":
            return _take_tree(plain["tree"], path, source)
        case "mapping":
            each, content = get_args(hint)[1], plain["mapping"]
            return {key: _restore(each, content[key], (*path, key), source) for key in content}
        case label:
            return _build(hint, plain[label], path, source, {})


def _take_tree(count: int, path: tuple[str, ...], source: _Source) -> Tree:
    """The `count` tensors whose keys begin with the path."""
    prefix = _key(path, "")
    begin = bisect_left(source.keys, prefix)
    tree: Tree = {}
    for key in source.keys[begin : begin + count]:
        match key.removeprefix(prefix).split("/", 2):
            case slot, factor, site if key.startswith(prefix):
                tree[Name(site, slot, factor)] = source.tensors.pop(key)
    if len(tree) != count:
        raise CodecError(f"{prefix[:-1]} holds {len(tree)} tensors instead of {count}")
    return {name: tree[name] for name in sorted(tree)}


def _build(
    cls: type[T],
    facts: Any,
    path: tuple[str, ...],
    source: _Source,
    given: Mapping[str, object],
) -> T:
    where, hints = "/".join((_label(cls), *path)), _hints(cls)
    if not isinstance(facts, dict):
        raise CodecError(f"{where} is {reprlib.repr(facts)} instead of fields")
    if missing := hints.keys() - given.keys() - facts.keys():
        raise CodecError(f"{where} lacks the field {min(missing)!r}")
    if extra := facts.keys() - (hints.keys() - given.keys()):
        raise CodecError(f"{where} has the unexpected field {min(extra)!r}")
    values = {name: _restore(hints[name], facts[name], (*path, name), source) for name in facts}
    try:
        return cls(**values, **given)
    except Exception as error:  # whatever the class itself checks
        raise CodecError(f"{where}: {error}") from error
