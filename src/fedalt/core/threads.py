"""How long a thread of PyTorch spins while it waits for the others, told before torch is loaded."""

import os
import sys
from typing import Final

# PyTorch's threads wait for each other after every product and by default spin meanwhile. Beside
# other work the one that is waited for has no core to run on, because the others are spinning.
_SPINS: Final = "100000"
_OF_THE_USER: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def spin_briefly() -> bool:
    """Let waiting threads of this process and of those it starts give up their core soon.

    Returns whether the environment was changed. What the user has set stays; and OpenMP reads its
    environment once, when torch is loaded, so that later nothing could be changed any more.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _OF_THE_USER):
        return False
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return True
