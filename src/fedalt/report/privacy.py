"""What a run's rounds have spent of privacy, in a sentence."""

from collections.abc import Iterable, Mapping
from typing import Any


def spent_privacy(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence on the privacy that a run's rounds have spent, if they keep count of it."""
    counted = [line for line in lines if line["kind"] == "round" and "delta" in line]
    if not counted:
        return []
    last = counted[-1]
    rounds, delta = f"{len(counted)} rounds", last["delta"]
    if last["epsilon"] is None:
        return [f"privacy: without noise {rounds} promise nothing (epsilon is infinite)"]
    return [f"privacy: epsilon {last['epsilon']:.3g} at delta {delta:g} spent in {rounds}"]
