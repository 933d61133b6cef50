"""What `fedalt client` tells its owner of each call and answer, in one line each."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.filesize import decimal

from fedalt.federation.messages import Answer, Call, Score
from fedalt.runs.checkpoints import newest

Say = Callable[[str], None]


def silent(_: str) -> None:
    """Tell nobody."""


def what_was_rejected(folder: Path, client_id: str, call: Call) -> str:
    """A sentence about an upload that the server rejected or did not wait for; "" without one.

    `folder` is that of the states as they are before the call is followed.
    """
    mine = newest(folder / "clients" / client_id, call.round - 1)
    trained = -1 if mine is None else int(mine.stem)
    if trained <= call.accepted:
        return ""
    before = (
        f"goes on from round {call.accepted + 1}" if call.accepted >= 0 else "begins from its start"
    )
    return (
        f"the server rejected the upload of round {trained + 1}, or it came too late; this client "
        f"{before} (`fedalt federation status` at the server says why)"
    )


def what_was_done(call: Call, answer: Answer, size: int, rounds: int) -> str:
    """A line for an answer of `size` bytes: trained, sent, scored what; "" for a farewell."""
    parts = []
    for cost in answer.costs:
        if cost.column == "own":
            steps, loss = cost.metrics.get("steps"), cost.metrics.get("loss")
            did = "trained" if steps is None else f"trained {steps:.0f} steps"
            parts.append(did + ("" if loss is None else f", loss {loss:.3f}"))
            parts.append(f"sent {decimal(size)}")
    parts += _scored(answer.scores)
    if not parts:
        return ""
    return f"{where(call, rounds)}: {', '.join(parts)}"


def where(call: Call, rounds: int) -> str:
    """The round of a call as people count; what comes after the last one has a name."""
    if call.round < rounds:
        return f"round {call.round + 1}/{rounds}"
    return f"after round {rounds}/{rounds}"


def _scored(scores: Iterable[Score]) -> list[str]:
    return [
        f"scored {score.column} of round {score.round + 1} on {score.split} data: "
        + " ".join(f"{name} {value:.3f}" for name, value in sorted(score.metrics.items()))
        for score in scores
    ]
