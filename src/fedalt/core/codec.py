"""States and messages to bytes and back: the same format on disk and on the wire.

The bytes are a safetensors file. A tensor's key is its field, slot, factor and site, joined by
"/"; all that is no tensor is JSON, whose types are those that the dataclass declares. A class is
stored under its `TAG`, a short constant of its own, so that it may be renamed and moved.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedalt.core.container import CodecError as CodecError
from fedalt.core.container import pack, unpack
from fedalt.core.digests import digest_of
from fedalt.core.files import atomic_write as atomic_write
from fedalt.core.plain import Source, build, flatten_fields, hints_of, label_of

T = TypeVar("T")


def encode(value: object, *, omit: Collection[str] = ()) -> bytes:
    """The bytes of a frozen dataclass of trees, numbers, texts, mappings, tuples and dataclasses.

    `omit` names fields of `value` that are kept elsewhere, such as a ledger. Equal values give
    equal bytes, whatever the order of their trees and mappings. An int in a field declared float
    is written as that float. Gradients, devices and shared memory are not kept.
    """
    cls = type(value)
    tensors: dict[str, Tensor] = {}
    facts = flatten_fields(cls, value, (), tensors, omit)
    return pack({"class": label_of(cls), "facts": facts}, tensors)


def decode(
    cls: type[T], data: bytes, *, given: Mapping[str, object] | None = None, finite: bool = False
) -> T:
    """The value that `encode` turned into these bytes, or `CodecError`.

    `given` holds the fields that were omitted. With `finite`, NaN and infinity are errors, in
    tensors and in facts. Trees come back sorted by name, on the CPU, in memory of their own.
    """
    content, tensors = unpack(data)
    if content.keys() != {"class", "facts"}:
        raise CodecError(f"the metadata are {sorted(content)} instead of class and facts")
    if content["class"] != label_of(cls):
        raise CodecError(
            f"these bytes hold a {content['class']}, but a {label_of(cls)} was expected"
        )
    if finite:
        require_finite(tensors.items())
    source = Source(tensors, sorted(tensors), finite)
    try:
        value: T = build(cls, content["facts"], (), source, given or {})
    except RecursionError:
        raise CodecError("the facts are nested deeper than any state") from None
    if tensors:
        raise CodecError(f"{len(tensors)} unexpected tensors, first {min(tensors)}")
    return value


def fields_of(cls: type, declared: object) -> tuple[str, ...]:
    """The fields of a dataclass that are declared as this type, such as all ledgers of a state."""
    return tuple(name for name, hint in hints_of(cls).items() if hint == declared)


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
    of: Callable[[Path], bytes] = Path.read_bytes,
) -> T:
    """Decode a file; an error about its content begins with its path. `of` reads its bytes."""
    try:
        return decode(cls, of(path), given=given)
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error


def require_finite(named: Iterable[tuple[str, Tensor]]) -> None:
    """Fail for a tensor with NaN or infinity, by its name."""
    for where, tensor in named:
        if tensor.is_floating_point() and not _all_finite(tensor.detach().cpu()):
            raise CodecError(f"{where} holds NaN or infinity")


def _all_finite(tensor: Tensor) -> bool:
    """In numpy, as torch's threads, waiting for each other, take seconds on a busy machine."""
    if tensor.dtype == torch.bfloat16:  # unknown to numpy; an exponent of ones is not finite
        return bool((tensor.view(torch.int16).numpy() & 0x7F80 != 0x7F80).all())
    return bool(np.isfinite(tensor.numpy()).all())
