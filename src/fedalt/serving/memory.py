"""How many tokens of running texts the memory holds, by what is free when the server starts."""

from pathlib import Path
from typing import Final

import psutil
import torch

from fedalt.adapters.shelf import SUM
from fedalt.models.base import Base
from fedalt.serving.batch import Adapters, Together

# A third for the keys and values, a third for the buffers that take their place while texts get
# longer, a third for the passes themselves.
_SHARE: Final = 1 / 3
_GROUPS: Final = Path("/sys/fs/cgroup")


def room_of(base: Base) -> int:
    """The tokens that may be held at once, gaps before shorter texts among them."""
    batch = Together(base, SUM)
    batch.join(Adapters(None, None, None), (base.pad_id,))
    return int(free_bytes(base.adapted.device) * _SHARE / batch.bytes_per_token)


def free_bytes(device: torch.device) -> int:
    """The memory of the device that nobody uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), *_limits())


def _limits() -> list[int]:
    """What a container or a service manager leaves to this process beyond what it has."""
    own = int(psutil.Process().memory_info().rss)
    limits = [2**63]
    told = Path("/proc/self/cgroup")
    lines = told.read_text().splitlines() if told.is_file() else []
    group = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    for folder in (_GROUPS / group, *(_GROUPS / group).parents):
        file = folder / "memory.max"
        if file.is_file() and (limit := file.read_text().strip()).isdigit():
            limits.append(max(0, int(limit) - own))
    return limits
