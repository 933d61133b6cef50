"""Centres that a few outliers cannot move far: of uploads, number by number, and of losses.

Yin, Chen, Ramchandran, Bartlett: "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", arXiv 1803.01498: median and trimmed mean. Every upload counts the same,
whatever weight it claims.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fedalt.core.codec import read
from fedalt.core.settings import Robust as Robust
from fedalt.core.tree import Name, Tree
from fedalt.methods.contract import Message

_LEFT_OUT: Final = 0.1  # of the losses that choose a round, at either end
_BLOCK = 2**22  # numbers of all uploads together that are in memory at once


def centre(files: Sequence[Path], robust: Robust, trim: float) -> Tree:
    """The centre of the encoded messages in these files, number by number; float32.

    All have the same names and shapes, in float32. Raises ValueError where they have not.
    """
    tree, cut = read(Message, files[0]).tree, cut_of(robust, trim, len(files))
    with ExitStack() as stack:  # mapped into memory: of all files together little is read at once
        uploads = {file: stack.enter_context(safe_open(file, "numpy")) for file in files}
        for file, upload in uploads.items():
            _require_like(tree, upload, file, files[0])
        return {
            name: _centre_of([upload.get_slice(_key(name)) for upload in uploads.values()], cut)
            for name in sorted(tree, key=str)
        }


def _key(name: Name) -> str:
    """What the codec calls a tensor of an upload's tree."""
    return f"tree/{name}"


def _require_like(tree: Tree, upload: Any, file: Path, first: Path) -> None:
    wanted = {_key(name): (list(tensor.shape), "F32") for name, tensor in tree.items()}
    parts = {key: upload.get_slice(key) for key in upload.keys()}  # noqa: SIM118 - no dict
    if {key: (part.get_shape(), part.get_dtype()) for key, part in parts.items()} != wanted:
        raise ValueError(f"{file} is no float32 upload of the same shapes as {first}")


def _centre_of(parts: Sequence[Any], cut: int) -> Tensor:
    """The centre of one tensor, some rows of all uploads at a time."""
    shape = parts[0].get_shape()
    result = np.empty(shape, np.float32)
    rows = max(1, _BLOCK // (len(parts) * max(1, math.prod(shape[1:]))))
    for begin in range(0, shape[0] if shape else 1, rows):
        at = slice(begin, min(begin + rows, shape[0])) if shape else ...
        block = np.stack([part[at] for part in parts])
        block.sort(axis=0)
        result[at] = block[cut : len(parts) - cut].mean(axis=0, dtype=np.float64)
    return torch.from_numpy(result)


def cut_of(robust: Robust, trim: float, count: int) -> int:
    """How many of `count` numbers are left out at either end; at least one or two remain.

    The median is the mean of what remains if as many as possible are left out.
    """
    most = (count - 1) // 2
    if robust == "median":
        return most
    return min(most, math.ceil(round(trim * count, 9)))  # 0.1 * 30 is a little more than 3


def central_loss(losses: Sequence[float]) -> float:
    """What a round's validation losses, one for each client, are together; nats.

    Their mean without a tenth of the least and of the greatest, rounded up: of three clients or
    more at least one at either end, so that no single client decides which round is the best. Of
    one or two it is the plain mean. A loss that is NaN counts as the greatest.
    """
    ordered = sorted(math.inf if math.isnan(loss) else loss for loss in losses)
    cut = cut_of("trimmed_mean", _LEFT_OUT, len(ordered))
    return fmean(ordered[cut : len(ordered) - cut])
