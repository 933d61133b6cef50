"""Uploads whose round is over: whether they count in a later one, and how much."""

from fedalt.federation.answer_schema import Asked
from fedalt.federation.messages import Call
from fedalt.federation.rules import Rules


class Late(Exception):  # noqa: N818 - nobody's mistake
    """An answer whose round is over, which the rules do not let count in this one."""


def require_counting(asked: Asked, call: Call | None, rules: Rules) -> None:
    """Whether an answer to a call of an earlier round counts in the round of `call`; Late if not.

    `call` is None for a client that is not called in this round.
    """
    over = f"its answer to the call of round {asked.round + 1} came after that round had ended"
    if rules.late == "drop":
        raise Late(f"{over}; it is dropped")
    if call is None or not call.train or not asked.trains:
        raise Late(f"{over}, and it does not train in this one; it is dropped")
    if asked.accepted != call.accepted:
        raise Late(f"{over}, and another upload of it has counted since; it is dropped")


def counts(rounds: int, rules: Rules, *, averages: bool) -> float:
    """What the weight of an upload so many rounds late is multiplied by.

    A method that does more with weights than to average, such as to subtract later what was added,
    needs them as they were sent.
    """
    return float((1 + rounds) ** -rules.staleness) if averages else 1.0
