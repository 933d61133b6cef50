"""Running a method's generators: the orders that they yield are executed, the answers sent in."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from fedalt.training.orders import Fit, Order

T = TypeVar("T")
Given = tuple[str, int, Order]  # a client, how many fits it ordered in the round before, the order
Execute = Callable[[Sequence[Given]], Sequence[Any]]  # the answer to each order

_MOST_ORDERS = 1_000_000


def run_generators(steps: Mapping[str, Generator[Order, Any, T]], execute: Execute) -> dict[str, T]:
    """What each client's generator returns; the first orders of all are executed together, etc.

    Fits alone are counted, since their number decides the batches: methods that look at the data
    before they train shall train on the same ones as all others.
    """
    ends: dict[str, T] = {}
    answers: dict[str, Any] = dict.fromkeys(steps)
    fits = dict.fromkeys(steps, 0)
    for _ in range(_MOST_ORDERS):
        orders = []
        for client_id, answer in answers.items():
            try:
                order = steps[client_id].send(answer)
            except StopIteration as end:
                ends[client_id] = end.value
            else:
                orders.append((client_id, fits[client_id], order))
                fits[client_id] += isinstance(order, Fit)
        if not orders:
            return {client_id: ends[client_id] for client_id in steps}
        executed = execute(orders)
        answers = {order[0]: answer for order, answer in zip(orders, executed, strict=True)}
    raise RuntimeError("a method gave a million orders in one round")


def run_one(steps: Generator[Order, Any, T], answer: Callable[[Order], Any]) -> T:
    """What one client's generator returns, each of its orders answered by a function."""
    ends = run_generators({"": steps}, lambda orders: [answer(order) for _, _, order in orders])
    return ends[""]
