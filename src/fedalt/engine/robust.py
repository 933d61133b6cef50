"""Centres that a few outliers cannot move far: of uploads, number by number, and of losses.

Yin, Chen, Ramchandran, Bartlett: "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", arXiv 1803.01498: median and trimmed mean. Every upload counts the same,
whatever weight it claims.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final, Literal

import numpy as np
import torch

from fedalt.core.codec import read
from fedalt.core.tree import Tree, numbers
from fedalt.methods.contract import Message

Robust = Literal["median", "trimmed_mean"]

_LEFT_OUT: Final = 0.1  # of the losses that choose a round, at either end
_BLOCK = 2**22  # numbers of all uploads together that are in memory at once


def centre(files: Sequence[Path], robust: Robust, trim: float) -> Tree:
    """The centre of the encoded messages in these files, number by number; float32.

    All have the same names and shapes, in float32. Raises ValueError where they have not.
    """
    tree = read(Message, files[0]).tree
    total, cut = numbers(tree), cut_of(robust, trim, len(files))
    bodies = {file: _body(file) for file in files}
    if wrong := [file for file in files if file.stat().st_size - bodies[file] != 4 * total]:
        raise ValueError(f"{wrong[0]} is no float32 upload of the same shapes as {files[0]}")
    flat = np.empty(total, np.float32)
    step = max(1, _BLOCK // len(files))
    for begin in range(0, total, step):
        block = np.stack([np.fromfile(f, "<f4", step, offset=bodies[f] + 4 * begin) for f in files])
        block.sort(axis=0)
        flat[begin : begin + step] = block[cut : len(files) - cut].mean(axis=0, dtype=np.float64)
    # In a file, tensors of one dtype lie in the order of their keys, which end in the name's text.
    order = sorted(tree, key=str)
    parts = torch.from_numpy(flat).split([tree[name].numel() for name in order])
    return {
        name: part.reshape(tree[name].shape).clone()
        for name, part in zip(order, parts, strict=True)
    }


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


def _body(file: Path) -> int:
    """Where the numbers of an encoded message begin."""
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")
