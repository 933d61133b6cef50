"""How examples are scored, and what comes of it."""

from dataclasses import dataclass

from fedalt.core.settings import Scoring as Scoring
from fedalt.evaluation.gate_statistics import Weighing


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and what there is to tell of each example, in the order of the examples.

    `loss`: mean over all answer tokens, nats. `accuracy` in [0, 1]: share of examples whose right
    option is the likeliest of its options, counted over those that list their answer.
    `predictions` are generated texts, or the names of a classifier's labels; `losses` means over
    each example's answer tokens. `weighing` is what a mixer or router did, if that was watched
    where all tokens are seen.
    """

    metrics: dict[str, float]
    predictions: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    weighing: Weighing | None = None
