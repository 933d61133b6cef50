"""What methods took, as cells of a table."""

from collections.abc import Sequence
from statistics import fmean

from fedalt.runs.compare import Cost

HEADS = ("trainable", "rank", "steps", "upload kB", "download kB", "seconds", "peak MB")


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
