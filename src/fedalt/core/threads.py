"""How many cores there are, and how long a thread of PyTorch spins while it waits for others."""

import os
import sys
from typing import Final

# PyTorch's threads wait for each other after every product and by default spin meanwhile. Beside
# other work the one that is waited for has no core to run on, because the others are spinning. So
# many spins cost 5 % alone; with more, two runs side by side keep each other waiting longer.
_SPINS: Final = "16000"
_OF_THE_USER: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def cores() -> int:
    """How many cores this process may use; a scheduler may give it few of a large machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spin_briefly() -> bool:
    """Let waiting threads of this process and of those it starts give up their core soon.

    Returns whether the environment was changed. What the user has set stays; and OpenMP reads its
    environment once, when torch is loaded, so that later nothing could be changed any more.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _OF_THE_USER):
        return False
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return True
