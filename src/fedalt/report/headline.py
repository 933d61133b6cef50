"""By which metric a client is shown in a table, and its numbers in that metric."""

from collections.abc import Mapping, Sequence
from typing import Final

from fedalt.runs.view import Metric

Values = tuple[float, ...]  # one number per seed
Scored = Mapping[str, Mapping[str, float]]  # metrics by client

LABELS: Final[Mapping[Metric, str]] = {
    "accuracy": "accuracy %",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "loss": "loss",
}
# The first that every column of a client has is its score; all are shown as shares of 100.
_HEADLINES: tuple[Metric, ...] = ("accuracy", "rougeL")
_SCALES = {"accuracy": 100.0}


def heading(metric: Metric) -> str:
    """What stands over a table that is headed by this metric."""
    name = LABELS.get(metric, "scores")
    return name[0].upper() + name[1:]


def metrics_of(
    clients: Sequence[str], columns: Mapping[str, Sequence[Scored]], metric: Metric
) -> dict[str, Metric]:
    """The metric that each client is shown by, without the clients that do not have it."""

    def has(client: str, name: str) -> bool:
        return all(
            name in seed[client] for seeds in columns.values() for seed in seeds if client in seed
        )

    if metric == "score":
        own: dict[str, Metric] = {
            client: next((name for name in _HEADLINES if has(client, name)), "loss")
            for client in clients
        }
        return dict.fromkeys(clients, "loss") if "loss" in own.values() else own
    if having := [client for client in clients if has(client, metric)]:
        return dict.fromkeys(having, metric)
    raise ValueError(
        f"metric = {metric!r}: no client has it with every method; accuracy needs options or "
        "labels, ROUGE generated texts"
    )


def values_of(seeds: Sequence[Scored], client: str, metric: str) -> Values:
    """The client's numbers, none at all if a seed lacks one: means of different seeds mislead."""
    scale = _SCALES.get(metric, 1.0)
    values = [seed[client][metric] * scale for seed in seeds if metric in seed.get(client, {})]
    return tuple(values) if len(values) == len(seeds) else ()
