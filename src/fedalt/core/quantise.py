"""A tree in few bits a number, as bytes; whoever packs it learns what the reader will make of it.

A tensor of two dimensions has one scale for each index of its shorter one, which in an adapter is
the rank: for row i of A (rank, d_in), for column i of B (d_out, rank). With n levels on either side
of 0 and u uniform in [0, 1),

    scale_i = max_j |x_ij| / n        q_ij = floor(x_ij / scale_i + u)        x_ij ~ q_ij scale_i,

which is x_ij on average and less than scale_i away from it. "bf16" rounds to the nearest instead,
by at most 2^-9 of the number. Deflate's Huffman code then makes frequent bytes short.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import prod
from typing import Final, Literal

import torch
from torch import Generator, Tensor

from fedalt.core.container import CodecError
from fedalt.core.tree import Name, Tree

Kind = Literal["bf16", "int8", "int4"]
Shapes = Mapping[Name, tuple[int, ...]]

LEVELS: Final[Mapping[Kind, int]] = {"int8": 127, "int4": 7}
_MOST_LAYOUT: Final = 2**24  # bytes of names and shapes
_MOST_INFLATED: Final = 8  # bytes that one can stand for: a Huffman code is a bit long, or longer
_LAYOUT, _NUMBERS = (Name("", "packed", part) for part in ("layout", "numbers"))


def pack(tree: Mapping[Name, Tensor], kind: Kind, stream: Generator) -> Tree:
    """The tree as two tensors of bytes, its layout and its numbers; equal inputs give equal bytes.

    `stream` decides which way numbers are rounded.
    """
    names = sorted(tree)
    layout = json.dumps([[*name, list(tree[name].shape)] for name in names], separators=(",", ":"))
    rows = [_rows(tree[name].detach().cpu().float()) for name in names]
    if kind == "bf16":
        numbers = [row.bfloat16().view(torch.uint8).view(-1, 2).T.reshape(-1) for row in rows]
    else:
        scales = [_largest(row) / LEVELS[kind] for row in rows]
        levels = [_levels(*pair, kind, stream) for pair in zip(rows, scales, strict=True)]
        numbers = [*scales, *(_halved(level) if kind == "int4" else level for level in levels)]
    return {_LAYOUT: _deflated(layout.encode()), _NUMBERS: _deflated(_bytes(numbers))}


def unpack(packed: Tree, kind: Kind, check: Callable[[Shapes], None]) -> Tree:
    """The float32 tree of `pack`'s bytes, which a stranger may have written.

    `check` is told names and shapes before there is memory for numbers; what it raises passes.
    Raises CodecError for bytes that are no packed tree.
    """
    if packed.keys() != {_LAYOUT, _NUMBERS} or any(t.dtype != torch.uint8 for t in packed.values()):
        raise CodecError("expected layout and numbers as bytes")
    shapes = _shapes(_inflated(packed[_LAYOUT], _MOST_LAYOUT, "the layout"))
    check(shapes)
    sizes = [_size_of_rows(shape) for shape in shapes.values()]
    scales = 0 if kind == "bf16" else sum(rows for rows, _ in sizes)
    length = 4 * scales + sum(_bytes_of(rows * columns, kind) for rows, columns in sizes)
    # A bound that grows with what was sent: whatever `pack` writes can be read, and few bytes of a
    # stranger's never ask for much memory.
    if length > (most := _MOST_INFLATED * packed[_NUMBERS].numel()):
        raise CodecError(f"{length} bytes of numbers, but what was sent holds at most {most}")
    data = _inflated(packed[_NUMBERS], length, "the numbers")
    if len(data) != length:
        raise CodecError(f"{len(data)} bytes of numbers, but the layout announces {length}")
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    scale = raw[: 4 * scales].view(torch.float32) if scales else raw
    place, tree = 4 * scales, {}
    for (name, shape), (rows, columns) in zip(shapes.items(), sizes, strict=True):
        size = _bytes_of(rows * columns, kind)
        numbers = _read(raw[place : place + size], rows, columns, kind)
        if kind != "bf16":
            numbers, scale = numbers * scale[:rows, None], scale[rows:]
        tree[name] = _unrowed(numbers, shape)
        place += size
    return tree


def _rows(tensor: Tensor) -> Tensor:
    """(rows, columns): one row for each index of the shorter dimension, or one for all numbers."""
    if tensor.dim() != 2:
        return tensor.reshape(1, -1)
    return (tensor if tensor.shape[0] <= tensor.shape[1] else tensor.T).contiguous()


def _size_of_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    return (min(shape), max(shape)) if len(shape) == 2 else (1, prod(shape))


def _unrowed(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 2 and shape[0] > shape[1]:
        return rows.T.contiguous()
    return rows.reshape(shape)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))


def _levels(rows: Tensor, scales: Tensor, kind: Kind, stream: Generator) -> Tensor:
    """Q as bytes; a row of zeros, whose scale is 0, stays one."""
    most = LEVELS[kind]
    steps = rows / scales.where(scales > 0, 1.0)[:, None]
    steps += torch.rand(rows.shape, generator=stream)
    return steps.floor_().clamp_(-most, most).to(torch.int8).view(torch.uint8).reshape(-1)


def _halved(levels: Tensor) -> Tensor:
    """Two levels a byte, an odd one filled up."""
    nibbles = (torch.nn.functional.pad(levels, (0, levels.numel() % 2)) & 15).view(-1, 2)
    return nibbles[:, 0] << 4 | nibbles[:, 1]


def _read(data: Tensor, rows: int, columns: int, kind: Kind) -> Tensor:
    """What the bytes of one tensor say, without their scale: (rows, columns), float32."""
    count = rows * columns
    if kind == "bf16":
        return data.view(2, -1).T.reshape(-1).view(torch.bfloat16).view(rows, columns).float()
    if kind == "int4":
        pairs = torch.stack((data >> 4, data & 15), dim=1).reshape(-1)[:count]
        return (((pairs + 8) & 15).float() - 8).view(rows, columns)
    return data.view(torch.int8).view(rows, columns).float()


def _bytes_of(count: int, kind: Kind) -> int:
    return {"bf16": 2 * count, "int8": count, "int4": (count + 1) // 2}[kind]


def _shapes(layout: bytes) -> Shapes:
    try:
        listed = json.loads(layout)
        shapes = {Name(*entry[:3]): tuple(entry[3]) for entry in listed}
        sound = all(type(part) is str for name in shapes for part in name) and all(
            type(size) is int and size >= 0 for shape in shapes.values() for size in shape
        )
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CodecError("the layout cannot be read") from error
    if not sound or len(shapes) != len(listed) or any(a > b for a, b in pairwise(shapes)):
        raise CodecError("the layout is not one of sorted names with a shape each")
    return shapes


def _bytes(parts: list[Tensor]) -> bytes:
    return b"".join(part.numpy().tobytes() for part in parts)


def _deflated(data: bytes) -> Tensor:
    """Huffman codes alone: repetitions, which numbers do not have, are not looked for."""
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    return torch.frombuffer(bytearray(coder.compress(data) + coder.flush()), dtype=torch.uint8)


def _inflated(data: Tensor, most: int, what: str) -> bytes:
    """The bytes, at most one more than announced: a few may stand for very many."""
    try:
        return zlib.decompressobj().decompress(data.numpy().tobytes(), most + 1)
    except zlib.error as error:
        raise CodecError(f"{what} cannot be read: {error}") from error
