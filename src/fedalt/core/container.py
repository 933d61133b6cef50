"""Facts and tensors in one safetensors file that shows every change made to it.

The file's only metadata are a text under the key "fedalt": the SHA-256 of the whole file, with
zeros in its own place, and then JSON with the facts and the format's version. With a single key
the safetensors library writes the same bytes for the same content.
"""

import json
import reprlib
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedalt.core.header import head_length

KEY = "fedalt"
VERSION = "2"
MAX_HEADER = 2**25  # bytes; a hundred thousand tensors need half of it
MAX_DIMENSIONS = 32

_BEGIN = b'{"__metadata__":{"%s":"' % KEY.encode()
_DIGEST = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + 64)  # where its hexadecimal digits stand
_ZEROS = b"0" * 64

_DTYPES = frozenset(
    {
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
    }
)


class CodecError(ValueError):
    """Bytes that are no state or message, or a value that cannot become bytes."""


def pack(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file that holds these; device, gradient and shared memory are not kept."""
    text, apart = dump({**facts, "version": VERSION}), _apart(tensors)
    try:
        data = safetensors.torch.save(apart, {KEY: _ZEROS.decode() + text})
    except (SafetensorError, ValueError) as error:
        raise CodecError(f"the tensors cannot become bytes: {error}") from error
    if (size := head_length(data)) > MAX_HEADER:
        raise CodecError(f"a header of {size} bytes, but at most {MAX_HEADER} can be read")
    return sealed(data)


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a file, once its size and its digest are right.

    The tensors lie on the CPU, each in memory of its own.
    """
    facts, end = _read_header(data)
    if len(data) != end:
        problem = "truncated" if len(data) < end else "trailing bytes"
        raise CodecError(f"{problem}: {len(data)} bytes, but the header announces {end}")
    if data[_DIGEST] != _digest(data):
        raise CodecError("corrupt: the checksum does not fit the content")
    try:
        # A copy into torch's own memory: sums over memory aligned otherwise may differ in the last
        # bit, and tensors of one file must not share it.
        tensors = {key: tensor.clone() for key, tensor in safetensors.torch.load(data).items()}
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise CodecError(f"corrupt: {reprlib.repr(str(error))}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CodecError(f"{key} has the unknown dtype {tensor.dtype}")
    return facts, tensors


def dump(plain: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sealed(data: bytes) -> bytes:
    """The same file with its digest in the place of the zeros."""
    return b"".join([data[: _DIGEST.start], _digest(data), memoryview(data)[_DIGEST.stop :]])


def _digest(data: bytes) -> bytes:
    digest = sha256(data[: _DIGEST.start] + _ZEROS)
    digest.update(memoryview(data)[_DIGEST.stop :])
    return digest.hexdigest().encode()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the library takes them: dense, and none in the memory of another."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CodecError(f"{key} is {reprlib.repr(tensor)} instead of a tensor")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            known = ", ".join(sorted(map(str, _DTYPES)))
            raise CodecError(
                f"{key} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, "
                f"but only dense tensors of {known} can become bytes"
            )
        if tensor.dim() > MAX_DIMENSIONS:
            raise CodecError(f"{key} has {tensor.dim()} dimensions, more than {MAX_DIMENSIONS}")
        dense = tensor.detach().cpu().contiguous()
        if dense.untyped_storage().data_ptr() in taken:
            dense = dense.clone()
        taken.add(dense.untyped_storage().data_ptr())
        apart[key] = dense
    return apart


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The facts, and how long the file has to be."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin > MAX_HEADER:
        raise CodecError(
            f"not ours: a header of {begin} bytes, but at most {MAX_HEADER} is allowed"
        )
    if len(data) < begin:
        raise CodecError(f"truncated: {len(data)} bytes, but the header alone has {begin}")
    try:
        header = json.loads(data[8:begin].decode())
        metadata = header.pop("__metadata__")
        if metadata.get("format") == KEY:
            raise _unknown(metadata.get("version"))
        text = metadata[KEY][len(_ZEROS) :]
        facts = json.loads(text)
        version = facts.pop("version")
        if any(len(entry["shape"]) > MAX_DIMENSIONS for entry in header.values()):
            raise ValueError(f"a tensor of more than {MAX_DIMENSIONS} dimensions")
        end = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end >= 2**63:  # which may have more digits than Python writes into an error
            raise ValueError("a tensor ends beyond what any file holds")
        ours = data[8:begin].startswith(_BEGIN) and dump({**facts, "version": version}) == text
    except CodecError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CodecError(f"not ours: the header cannot be read ({reprlib.repr(error)})") from error
    if not ours:
        raise CodecError("not ours: the header is not as it was written")
    if version != VERSION:
        raise _unknown(version)
    return facts, end


def _unknown(version: object) -> CodecError:
    return CodecError(f"version {version!r} of the format, but only {VERSION!r} is known")
