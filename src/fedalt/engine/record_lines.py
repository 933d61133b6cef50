"""The lines of a run's record, rounds.jsonl: of a simulation's and of a federation's."""

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from fedalt.engine.round import ClientRound, Outcome
from fedalt.engine.schedule import Line
from fedalt.engine.uploads import Metrics


def train_line(round_: int, column: str, client: ClientRound, **more: object) -> Line:
    """A client's training of a column; `more` are further keys."""
    return {
        "kind": "train",
        "round": round_,
        **more,
        "client": client.client_id,
        "column": column,
        "metrics": dict(client.metrics),
        "upload_bytes": client.upload_bytes,
        "download_bytes": client.download_bytes,
        "seconds": client.seconds,
        **({} if client.refused is None else {"refused": client.refused}),
    }


def score_line(split: str, round_: int, client_id: str, column: str, metrics: Metrics) -> Line:
    """Metrics of what a client serves after a round."""
    about = {"split": split, "round": round_, "client": client_id, "column": column}
    return {"kind": "score", **about, "metrics": dict(metrics)}


def round_line(round_: int, cohort: int, began: float, outcome: Outcome) -> Line:
    """What is recorded of a round: its seconds since `began`, the most memory held so far.

    Of its outcome: how far what the server sends next is from its state where it is rounded, and
    the clip of uploads where it follows them.
    """
    error, clip = outcome.download_error, outcome.clip
    return {
        "kind": "round",
        "round": round_,
        "cohort": cohort,
        "seconds": time.monotonic() - began,
        "peak_memory_bytes": _peak_memory(),
        **({} if error is None else {"download_error": error}),
        **({} if clip is None else {"clip": clip}),
    }


def _peak_memory() -> int:
    """The most memory that this process has held up to now, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def last_accepted(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The last round of each client whose upload was accepted, as a federation's record tells."""
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
