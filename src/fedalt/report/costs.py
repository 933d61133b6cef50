"""What methods took, as cells of a table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from fedalt.runs.cells import Cost, cost_in
from fedalt.runs.folder import open_run
from fedalt.runs.record import StoreError, summary_in

HEADS = ("trainable", "rank", "steps", "upload kB", "download kB", "seconds", "peak MB")


def cost_of(path: Path) -> Cost:
    """What a finished run took, by its record. Raises StoreError where that has no summary."""
    lines = open_run(path).lines()
    if (summary := summary_in(lines)) is None:
        raise StoreError(
            f"{path / 'rounds.jsonl'} has no summary of the run, which is written once it has been "
            f"tested; `fedalt resume {path}` adds what is missing"
        )
    trained = [line for line in lines if line["kind"] == "train"]
    took = {
        "upload_bytes": fmean(line["upload_bytes"] for line in trained),
        "download_bytes": fmean(line["download_bytes"] for line in trained),
        "seconds": sum(line["seconds"] for line in trained),
        "peak_memory_bytes": max(
            line["peak_memory_bytes"] for line in lines if line["kind"] == "round"
        ),
    }
    return cost_in({**summary["effort"], **took})


def cost_cells(costs: Sequence[Cost]) -> list[str]:
    """Means over the seeds, in the order of HEADS."""
    most, least = costs[0].trainable_numbers, costs[0].least_numbers
    smallest, largest = costs[0].ranks
    steps = f"{fmean(cost.steps for cost in costs):.0f}"
    before_serving = fmean(cost.serving_steps for cost in costs)
    return [
        str(most) if least in (0, most) else f"{least}–{most}",
        str(largest) if smallest == largest else f"{smallest}–{largest}",
        f"{steps} + {before_serving:.0f}" if before_serving else steps,
        f"{fmean(cost.upload_bytes for cost in costs) / 1e3:.1f}",
        f"{fmean(cost.download_bytes for cost in costs) / 1e3:.1f}",
        f"{fmean(cost.seconds for cost in costs):.0f}",
        f"{max(cost.peak_memory_bytes for cost in costs) / 1e6:.0f}",
    ]


def steps_told(
    costs: Mapping[str, Sequence[Cost]], wanted: Literal["equal", "rounds"]
) -> Iterator[str]:
    """Whether all methods took as many optimiser steps, those before they serve included.

    If not, which ones differ from what most of them took.
    """
    taken = {label: fmean(c.steps + c.serving_steps for c in of) for label, of in costs.items()}
    shown = {label: f"{steps:.0f}" for label, steps in taken.items()}
    usual, _ = Counter(shown.values()).most_common(1)[0]
    if unlike := {label: steps for label, steps in shown.items() if steps != usual}:
        told = ", ".join(
            f"{label} {steps} ({float(steps) / max(float(usual), 1) - 1:+.0%})"
            for label, steps in unlike.items()
        )
        which = (
            "Warning: steps are not equal" if wanted == "equal" else "Rounds are equal, steps not"
        )
        yield f"{which}: a client takes {usual} in all, serving included, but with {told}."
    elif len(shown) > 1:
        yield f"A client takes {usual} optimiser steps with every method, serving included."
