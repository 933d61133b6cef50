"""The lines of a federation's record: what a round's answers come to, and what they tell later."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedalt.engine.schedule import Line
from fedalt.federation.round_collector import Desk


def score_lines(desk: Desk, client_id: str) -> Iterator[Line]:
    """A line for each score in a client's answer."""
    for score in desk.answers[client_id].scores:
        yield {
            "kind": "score",
            "split": score.split,
            "round": score.round,
            "client": client_id,
            "column": score.column,
            "metrics": dict(score.metrics),
        }


def train_lines(desk: Desk, client_id: str, refused: str | None) -> Iterator[Line]:
    """A line for each column that a client has trained; `refused` says why it does not count."""
    answer = desk.answers[client_id]
    for cost in answer.costs:
        own = cost.column == "own"
        line = {
            "kind": "train",
            "round": desk.round,
            "trained": answer.round,
            "client": client_id,
            "column": cost.column,
            "metrics": dict(cost.metrics),
            "upload_bytes": desk.uploads[client_id] if own else 0,
            "download_bytes": desk.downloads.get(client_id, 0) if own else 0,
            "seconds": cost.seconds,
        }
        yield line if refused is None else {**line, "refused": refused}


def last_counted(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The last round of each client whose upload counts, as the record tells."""
    return {
        line["client"]: line["trained"]
        for line in lines
        if line["kind"] == "train" and line["column"] == "own" and "refused" not in line
    }


def is_validated(lines: Iterable[Mapping[str, Any]], round_: int) -> bool:
    """Whether anybody has scored a round on validation data."""
    return any(
        line["kind"] == "score" and line["split"] == "validation" and line["round"] == round_
        for line in lines
    )
