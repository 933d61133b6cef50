"""Texts and tensors in one safetensors file that shows every change made to it.

The header's `__metadata__` holds the texts and, besides, format, version and sha256 (of all the
rest). The same content gives the same bytes, and nothing but those bytes is accepted for it.

The file is laid out here because the library's functions on bytes hide the metadata and order it
by chance; what is written here, the library reads.
"""

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = "fedalt"
VERSION = "1"
MAX_HEADER = 2**25  # bytes; a hundred thousand tensors need half of it
MAX_DIMENSIONS = 32

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


class CodecError(ValueError):
    """Bytes that are no state or message, or a value that cannot become bytes."""


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


def pack(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file that holds these; device, gradient and shared memory are not kept."""
    metadata = {**texts, "format": FORMAT, "version": VERSION}
    entries = {key: _describe(key, tensor) for key, tensor in tensors.items()}
    parts = [_bytes_of(tensors[key]) for key in _in_order(entries)]
    header = _header({**metadata, "sha256": _digest(metadata, entries, parts)}, entries)
    if len(header) > MAX_HEADER:
        raise CodecError(f"a header of {len(header)} bytes, but at most {MAX_HEADER} can be read")
    return b"".join([header, *parts])


def unpack(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and tensors of a file, once its header is exactly ours and the checksum holds.

    The tensors lie on the CPU, each in memory of its own.
    """
    view = memoryview(data)
    metadata, entries, begin = _read_header(view)
    end = begin + sum(entry.size for entry in entries.values())
    if len(view) != end:
        problem = "truncated" if len(view) < end else "trailing bytes"
        raise CodecError(f"{problem}: {len(view)} bytes, but the header announces {end}")
    checksum = metadata.pop("sha256")
    if _digest(metadata, entries, [view[begin:]]) != checksum:
        raise CodecError("corrupt: the checksum does not fit the content")
    tensors: dict[str, Tensor] = {}
    for key in _in_order(entries):
        tensors[key] = _tensor_of(key, entries[key], view[begin : begin + entries[key].size])
        begin += entries[key].size
    del metadata["format"], metadata["version"]
    return metadata, tensors


def head_length(data: bytes) -> int:
    """How many bytes of a file come before its tensors; all of what is no such file, or less."""
    return min(len(data), 8 + int.from_bytes(data[:8], "little"))


def dump(plain: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _header(metadata: Mapping[str, str], entries: Mapping[str, _Entry]) -> bytes:
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key in _in_order(entries):
        begin, end = end, end + entries[key].size
        described[key] = {
            "dtype": entries[key].code,
            "shape": entries[key].shape,
            "data_offsets": (begin, end),
        }
    text = dump(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _in_order(entries: Mapping[str, _Entry]) -> list[str]:
    return sorted(entries, key=lambda key: (-entries[key].width, key))  # wide first: all aligned


def _digest(
    metadata: Mapping[str, str], entries: Mapping[str, _Entry], parts: Iterable[memoryview]
) -> str:
    digest = sha256(_header(metadata, entries))
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_header(view: memoryview) -> tuple[dict[str, str], dict[str, _Entry], int]:
    """Metadata, entries, and where the tensors begin."""
    begin = 8 + int.from_bytes(view[:8], "little")
    if begin > MAX_HEADER:
        raise CodecError(
            f"not ours: a header of {begin} bytes, but at most {MAX_HEADER} is allowed"
        )
    if len(view) < begin:
        raise CodecError(f"truncated: {len(view)} bytes, but the header alone has {begin}")
    header = bytes(view[:begin])
    try:
        described = json.loads(header[8:].decode())
        metadata = described.pop("__metadata__")
        ours = metadata["format"] == FORMAT and all(type(text) is str for text in metadata.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CodecError(f"not ours: the header cannot be read ({error!r})") from error
    if not ours:
        raise CodecError(f"not ours: the metadata do not say format {FORMAT!r}")
    if (version := metadata.get("version")) != VERSION:
        raise CodecError(f"version {version!r} of the format, but only {VERSION!r} is known")
    if "sha256" not in metadata:
        raise CodecError("corrupt: the metadata have no sha256")
    entries = {key: _entry(key, entry) for key, entry in described.items()}
    try:
        rebuilt = _header(metadata, entries)
    except ValueError as error:  # a key that is no text, a size of thousands of digits
        raise CodecError(f"corrupt: {error}") from error
    if rebuilt != header:
        raise CodecError("corrupt: the header is not as it was written")
    return metadata, entries, begin


def _entry(key: str, described: Any) -> _Entry:
    try:
        code, shape = described["dtype"], tuple(described["shape"])
    except (TypeError, KeyError) as error:
        raise CodecError(f"corrupt: {key} has no dtype and shape") from error
    if not (isinstance(code, str) and code in _DTYPES):
        raise CodecError(f"{key} has the unknown dtype {reprlib.repr(code)}")
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise CodecError(f"{key} has the impossible shape {reprlib.repr(shape)}")
    return _Entry(code, shape)


def _describe(key: str, tensor: Tensor) -> _Entry:
    if not isinstance(tensor, Tensor):
        raise CodecError(f"{key} is {reprlib.repr(tensor)} instead of a tensor")
    if tensor.dtype not in _CODES or tensor.layout != torch.strided or tensor.is_meta:
        known = ", ".join(sorted(_CODES.values()))
        raise CodecError(
            f"{key} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, "
            f"but only dense tensors of {known} can become bytes"
        )
    if tensor.dim() > MAX_DIMENSIONS:
        raise CodecError(f"{key} has {tensor.dim()} dimensions, more than {MAX_DIMENSIONS}")
    return _Entry(_CODES[tensor.dtype], tuple(tensor.shape))


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _tensor_of(key: str, entry: _Entry, data: memoryview) -> Tensor:
    try:
        # Torch's own memory: sums over memory aligned otherwise may differ in the last bit.
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.code])
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CodecError(f"{key} has the impossible shape {entry.shape}") from error
    _bytes_of(tensor)[:] = data
    return tensor
