"""How examples are scored, and what comes of it."""

from dataclasses import dataclass

from fedalt.evaluation.gate_statistics import Weighing


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How test and validation examples are scored.

    `generate`: also write answers, for exact match and ROUGE, with `beams` beams (1 is greedy) and
    at most `max_new_tokens` tokens each.
    """

    batch_size: int = 32
    generate: bool = True
    beams: int = 1
    max_new_tokens: int = 80

    def __post_init__(self) -> None:
        for name in ("batch_size", "beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but it is at least 1")


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and what there is to tell of each example, in the order of the examples.

    `loss`: mean over all answer tokens, nats. `accuracy` in [0, 1]: share of examples whose right
    option is the likeliest of its options, counted over those that list their answer.
    `predictions` are generated texts, or the names of a classifier's labels; `losses` means over
    each example's answer tokens. `weighing` is what a mixer or router did, if that was watched.
    """

    metrics: dict[str, float]
    predictions: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    weighing: Weighing | None = None
