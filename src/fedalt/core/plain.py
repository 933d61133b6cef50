"""A value and its plain form, which is what JSON can hold, as the dataclass declares it."""

import math
import reprlib
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from inspect import formatannotation
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from fedalt.core.container import CodecError, dump
from fedalt.core.tree import Name, Tree

T = TypeVar("T")

_SCALARS = (bool, int, float, str, NoneType)
_ODD_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers
_EXACT = 2**53  # floats hold every int up to here
_MOST_BITS = 63  # of an int beside its sign; one that is far longer cannot be shown in an error


class Source(NamedTuple):
    """Tensors not yet taken, all keys sorted, and whether NaN is an error."""

    tensors: dict[str, Tensor]
    keys: list[str]
    finite: bool


def label_of(cls: type) -> str:
    """The tag that a class is stored under."""
    tag = vars(cls).get("TAG")  # its own: a class that inherits one would be taken for another
    if not isinstance(tag, str):
        raise CodecError(f"{cls.__qualname__} has no TAG to be stored under")
    return tag


def hints_of(cls: type) -> dict[str, Any]:
    """What the fields of a dataclass are declared as."""
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
        return label_of(hint)
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
        return any(type(literal) is type(value) and literal == value for literal in get_args(hint))
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


def flatten_fields(
    cls: type,
    value: object,
    path: tuple[str, ...],
    tensors: dict[str, Tensor],
    omit: Collection[str] = (),
) -> dict[str, Any]:
    """The plain form of each field but those to omit; its tensors are put into `tensors`."""
    hints = hints_of(cls)
    if unknown := set(omit) - hints.keys():
        raise CodecError(f"{label_of(cls)} has no field {min(unknown)!r} to omit")
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
            _require_short(value, where)
            _require_json(value, where)
            return value
        case "tree":
            for name, tensor in value.items():
                key = _key((*path, name.slot, name.factor), name.site)
                _require_json(key, where)
                tensors[key] = tensor
            return {"tree": len(value)}
        case "mapping":
            inner = get_args(hint)[1]
            for key in value:
                _require_json(key, where)
            return {"mapping": {k: _flatten(inner, value[k], (*path, k), tensors) for k in value}}
        case label:
            return {label: flatten_fields(hint, value, path, tensors)}


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


def _require_short(value: object, where: str) -> None:
    """Refuse an int that no count comes to: Python writes none of more than 4300 digits.

    One of 4300 can be read, and has a digit more once 1 is added to it.
    """
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise CodecError(
            f"{where} is an int of {value.bit_length()} bits, expected at most {_MOST_BITS}"
        )


def _restore(hint: Any, plain: Any, path: tuple[str, ...], source: Source) -> Any:
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
            _require_short(plain, where)
            return plain
        case "tree":
            _require_short(plain["tree"], where)
            return _take_tree(plain["tree"], path, source)
        case "mapping":
            inner, content = get_args(hint)[1], plain["mapping"]
            return {key: _restore(inner, content[key], (*path, key), source) for key in content}
        case label:
            return build(hint, plain[label], path, source, {})


def _take_tree(count: int, path: tuple[str, ...], source: Source) -> Tree:
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


def build(
    cls: type[T],
    facts: Any,
    path: tuple[str, ...],
    source: Source,
    given: Mapping[str, object],
) -> T:
    """The value of a dataclass' plain form; `given` holds the fields that were omitted."""
    where, hints = "/".join((label_of(cls), *path)), hints_of(cls)
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
