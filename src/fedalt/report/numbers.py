"""The numbers of a record's line under the names that trackers show."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from fedalt.core.foreign import shown


def numbers_of(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value: kind/metric/column/client, and of a whole round its seconds.

    Of a mixer the mean weight of each slot. In a federation clients choose what metrics are called.
    """
    yield from ((shown(name), value) for name, value in _numbers_of(line))


def step_of(line: Mapping[str, Any]) -> int:
    """How many rounds are over when a line's numbers are: 0 for scores before any training."""
    return int(line["round"]) + 1


def _numbers_of(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    match line["kind"]:
        case "round":
            yield "round/seconds", line["seconds"]
        case "train":
            yield from _metrics(line, "train")
            yield f"train/upload_bytes/{line['column']}/{line['client']}", line["upload_bytes"]
        case "score":
            yield from _metrics(line, line["split"])
        case "mixer":
            where = f"{line['column']}/{line['client']}"
            for at, slot in enumerate(line["slots"]):
                mean = fmean(weights[at] for weights in line["weights"].values())
                yield f"{line['split']}/weight_of_{slot}/{where}", mean


def _metrics(line: Mapping[str, Any], kind: str) -> Iterator[tuple[str, float]]:
    for metric, value in line["metrics"].items():
        yield f"{kind}/{metric}/{line['column']}/{line['client']}", value
