"""A base model's weights in memory that several processes of one machine map.

Not PyTorch's own shared memory: that lies in /dev/shm, which containers make smaller than a model,
and who writes beyond its size is killed. An anonymous file (memfd) is limited by memory alone, and
nothing of it is left when its processes have ended, in whatever way.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor, nn

_ALIGNED: Final = 16  # float32 numbers: 64 bytes, as PyTorch's own allocator places tensors


@contextmanager
def shared_weights(model: nn.Module) -> Iterator[str]:
    """Move a frozen model's float32 weights on the CPU to a place that `map_weights` takes.

    Within the context other processes of this user can open the place; who has mapped it keeps it.
    "" where nothing can be shared: on other systems than Linux, and on a GPU.
    """
    if not _weights(model) or not hasattr(os, "memfd_create"):
        yield ""
        return
    file = os.memfd_create("fedalt-weights")
    try:
        place = f"/proc/{os.getpid()}/fd/{file}"
        for weight, part in _parts(model, place, write=True):
            part.copy_(weight)
            weight.data = part
        _give_back_memory()
        yield place
    finally:
        os.close(file)


def map_weights(model: nn.Module, place: str) -> None:
    """Let a model with the same weights use those of another process; "" leaves it as it is."""
    if place:
        for weight, part in _parts(model, place, write=False):
            weight.data = part
        _give_back_memory()


def _give_back_memory() -> None:
    """Let the system have what the former weights took: the GNU C library keeps most of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [
        weight
        for weight in model.parameters()  # tied ones once
        if weight.device.type == "cpu" and weight.dtype == torch.float32
    ]


def _parts(model: nn.Module, place: str, *, write: bool) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every weight with its part of the file; without `write` changes stay in this process."""
    weights = _weights(model)
    room = [-(-weight.numel() // _ALIGNED) * _ALIGNED for weight in weights]
    flat = torch.from_file(place, shared=write, size=sum(room), dtype=torch.float32)
    for weight, start in zip(weights, accumulate(room, initial=0), strict=False):
        yield weight, flat[start : start + weight.numel()].view(weight.shape)
