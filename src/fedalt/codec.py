"""States and messages to bytes and back: one safetensors file, on disk and on the wire alike.

The header's `__metadata__` holds format, version, class, facts (every field that is no tensor, as
JSON) and sha256 (of all the rest). A tensor's key is its field, slot, factor and site, joined by
"/". Equal values give equal bytes, and nothing but those bytes decodes to them.

The container is written here because the library's functions on bytes hide the metadata, order it
by chance and copy every tensor twice; what is written here, the library reads.
"""

import contextlib
import json
import math
import os
import reprlib
import secrets
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fedalt.tree import Name, Tree

FORMAT = "fedalt"
VERSION = "1"
MAX_HEADER = 2**25  # bytes; a hundred thousand tensors need half of it
MAX_DIMENSIONS = 32

_METADATA = ("format", "version", "class", "facts", "sha256")
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SCALARS = (bool, int, float, str, NoneType)

T = TypeVar("T")


class CodecError(ValueError):
    """Bytes that are no state or message, or a value that the codec cannot hold."""


class _Entry(NamedTuple):
    """A tensor as the header describes it."""

    code: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return _DTYPES[self.code].itemsize

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.width


def encode(value: object, *, omit: Collection[str] = ()) -> bytes:
    """The bytes of a frozen dataclass of trees, numbers, texts, mappings, tuples and dataclasses.

    `omit` names fields of `value` that are kept elsewhere, such as a ledger. Equal values give
    equal bytes, whatever the order of their trees and mappings. An int in a field declared float
    is written as that float. Gradients, devices and shared memory are not kept.
    """
    tensors: dict[str, Tensor] = {}
    facts = _pack_fields(type(value), value, (), tensors, omit)
    entries = {key: _Entry(_CODES[each.dtype], tuple(each.shape)) for key, each in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "class": _class_name(type(value)),
        "facts": _dump(facts),
        "sha256": "",
    }
    parts = [_bytes_of(tensors[key]) for key in _in_order(entries)]
    metadata["sha256"] = _digest(metadata, entries, parts)
    header = _header(metadata, entries)
    if len(header) > MAX_HEADER:
        raise CodecError(f"a header of {len(header)} bytes, but at most {MAX_HEADER} can be read")
    return b"".join([header, *parts])


def decode(
    cls: type[T], data: bytes, *, given: Mapping[str, object] | None = None, finite: bool = False
) -> T:
    """The value that `encode` turned into these bytes, or `CodecError`.

    `given` holds the fields that were omitted. With `finite`, NaN and infinity are errors, in
    tensors and in facts. Trees come back sorted by name, on the CPU, in memory of their own.
    """
    given = given or {}
    try:
        metadata, tensors = _open(memoryview(data))
        if metadata["class"] != (wanted := _class_name(cls)):
            raise CodecError(f"these bytes hold a {metadata['class']}, but a {wanted} was expected")
        facts = _parse(metadata["facts"])
        if finite:
            _require_finite(tensors.items())
        source = _Source(tensors, sorted(tensors), finite)
        value: T = _take_fields(cls, facts, (), source, given)
        if tensors:
            raise CodecError(f"{len(tensors)} unexpected tensors, first {min(tensors)}")
    except RecursionError:
        raise CodecError("the facts are nested deeper than any state") from None
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
        tensor = tree[name]
        if tuple(tensor.shape) != (shape := tuple(shapes[name])):
            got = tuple(tensor.shape)
            raise CodecError(f"{what}: {name} has shape {got}, but {shape} was expected")
        if dtype is not None and tensor.dtype != dtype:
            raise CodecError(f"{what}: {name} is {tensor.dtype}, but {dtype} was expected")
    if finite:
        _require_finite((f"{what}: {name}", tree[name]) for name in sorted(tree))


def fields_of(cls: type, declared: object) -> tuple[str, ...]:
    """The fields of a dataclass that are declared as this type, such as all ledgers of a state."""
    return tuple(name for name, hint in _hints(cls).items() if hint == declared)


def write(path: Path, value: object, *, omit: Collection[str] = ()) -> None:
    """Encode into a file, which is replaced whole or not at all."""
    try:
        data = encode(value, omit=omit)
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error
    atomic_write(path, data)


def read(
    cls: type[T], path: Path, *, given: Mapping[str, object] | None = None, finite: bool = False
) -> T:
    """Decode a file; an error about its content begins with its path."""
    try:
        return decode(cls, path.read_bytes(), given=given, finite=finite)
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file by one with this content, so that a crash leaves the old or the new one.

    The new content waits beside it in a file `.XXXX.tmp`, which only a kill can leave behind.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk's own error names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
