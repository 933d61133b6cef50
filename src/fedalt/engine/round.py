"""One round of any method in one process: states in, states out, training where a method asks."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

from fedalt.adapters.start import Start
from fedalt.core.codec import encode
from fedalt.engine.dry_run import Rehearsals
from fedalt.engine.screening import USUAL, Arrival, Gate, Yard, take_in
from fedalt.methods.contract import AnyMethod, Message, Serving
from fedalt.training.orders import Order

T = TypeVar("T")
Metrics = Mapping[str, int | float]
CarryOut = Callable[[str, int, Order], Any]  # client, the how-manieth order of its round, the order
# The same for several clients at once: an answer to each.
CarryOutAll = Callable[[Sequence[tuple[str, int, Order]]], Sequence[Any]]


class States(Yard, Protocol):
    """Where the states of one arm lie: read as of the round before, written for this one."""

    def get(self, key: str, cls: type[T]) -> T | None:
        """The newest value under a key such as "server" or "clients/alice", if there is one."""
        ...

    def backed(self, key: str, value: T) -> T:
        """A method's first value, its ledgers exchanged for what these states keep them in."""
        ...

    def put(self, key: str, value: object) -> None:
        """Keep a value; until the round is committed, the old one stays too."""
        ...

    def drop(self, key: str) -> None:
        """Forget what this round has put under a key and below it; the old values stay."""
        ...


@dataclass(frozen=True)
class ClientRound:
    """A client's round: bytes of both encoded messages, seconds as its part of its group's.

    `metrics` are those of its reply. `refused` says why its upload does not count; then its round
    has not happened.
    """

    client_id: str
    upload_bytes: int
    download_bytes: int
    seconds: float
    metrics: Metrics = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Reply:
    """What comes of a client's training: its upload, its part of its group's seconds, metrics."""

    TAG: ClassVar = "reply"

    client_id: str
    upload: Message
    seconds: float
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """A round of one method: where its states lie, and the server's state that it begins with."""

    method: AnyMethod
    start: Start
    states: States
    server: Any

    @staticmethod
    def of(method: AnyMethod, start: Start, states: States) -> "Exchange":
        """The round for which the states are written."""
        return Exchange(method, start, states, server_of(method, start, states))

    def train(self, group: Sequence[str], carry_out: CarryOutAll) -> list[Reply]:
        """Broadcast and local training, whose orders are carried out together.

        The clients' new states are kept; the server's waits for what is made of the replies.
        """
        began = time.monotonic()
        steps = {
            each: self.method.local(
                client_of(self.method, self.start, self.states, each),
                self.method.broadcast(self.server, each),
            )
            for each in group
        }
        ends = drive_all(steps, carry_out)
        seconds = (time.monotonic() - began) / max(len(group), 1)
        for client_id, (after, _) in ends.items():
            self.states.put(f"clients/{client_id}", after)
        return [Reply(client_id, upload, seconds) for client_id, (_, upload) in ends.items()]

    def take_in(
        self, replies: Iterable[Reply], report: Callable[[ClientRound], None], gate: Gate = USUAL
    ) -> bool:
        """Aggregate the uploads, which come sorted by client and are asked for one at a time.

        A client whose upload the gate refuses keeps the state that it had. False if all are
        refused: the server's state stays.
        """
        asked = 0
        size_of, forms_of = _Sizes(), Rehearsals(self.method, self.start)

        def decide(cost: ClientRound, reason: str | None) -> None:
            if reason is not None:
                self.states.drop(f"clients/{cost.client_id}")
                self.states.drop(f"moments/{cost.client_id}")
            report(replace(cost, refused=reason))

        def arrivals() -> Iterator[Arrival]:
            nonlocal asked
            for each in replies:
                asked += 1
                message = self.method.broadcast(self.server, each.client_id)
                data, sent = encoded(each.upload), size_of(message)
                cost = ClientRound(each.client_id, len(data), sent, each.seconds, each.metrics)
                forms = forms_of(each.client_id, message)
                yield Arrival(each.client_id, each.upload, data, forms, partial(decide, cost))

        after = take_in(self.method, self.server, arrivals(), gate, self.states)
        if not asked:  # a round without a cohort is a round too
            after = self.method.aggregate(self.server, ())
        if after is not None:
            self.states.put("server", after)
        return after is not None


def run_round(
    method: AnyMethod,
    start: Start,
    states: States,
    groups: Iterable[Sequence[str]],
    carry_out: CarryOutAll,
    report: Callable[[ClientRound], None],
    gate: Gate = USUAL,
) -> bool:
    """Broadcast, local training, upload and aggregation for the clients of a cohort.

    `groups` are the clients whose orders are carried out together; all ids come sorted. Replies
    are streamed in that order, so only one group's states are in memory. See `Exchange.take_in`.
    """
    exchange = Exchange.of(method, start, states)
    replies = (reply for group in groups for reply in exchange.train(group, carry_out))
    return exchange.take_in(replies, report, gate)


def servings(
    method: AnyMethod, start: Start, states: States, client_id: str, carry_out: CarryOut
) -> tuple[Serving, Serving | None]:
    """What a client would serve now, and the shared part alone if there is one."""
    message = method.broadcast(server_of(method, start, states), client_id)
    client = client_of(method, start, states, client_id)
    own = drive(method.deploy(client, message), carry_out, client_id)
    return own, method.shared(client, message)


def server_of(method: AnyMethod, start: Start, states: States) -> Any:
    """The server's newest state, or its first."""
    kept = states.get("server", method.server_state)
    return states.backed("server", method.init_server(start)) if kept is None else kept


def client_of(method: AnyMethod, start: Start, states: States, client_id: str) -> Any:
    """A client's newest state, or its first."""
    kept = states.get(f"clients/{client_id}", method.client_state)
    return method.init_client(start, client_id) if kept is None else kept


def drive(steps: Generator[Order, Any, T], carry_out: CarryOut, client_id: str) -> T:
    """Carry out a method's orders until it returns."""
    return drive_all({client_id: steps}, one_by_one(carry_out))[client_id]


def one_by_one(carry_out: CarryOut) -> CarryOutAll:
    """Carries out orders one after the other."""
    return lambda orders: [carry_out(*order) for order in orders]


def drive_all(
    steps: Mapping[str, Generator[Order, Any, T]], carry_out: CarryOutAll
) -> dict[str, T]:
    """Carry out the orders of several clients, their first ones together, and so on."""
    ends: dict[str, T] = {}
    answers: dict[str, Any] = dict.fromkeys(steps)
    for number in range(1_000_000):
        orders = []
        for client_id, answer in answers.items():
            try:
                orders.append((client_id, number, steps[client_id].send(answer)))
            except StopIteration as end:
                ends[client_id] = end.value
        if not orders:
            return {client_id: ends[client_id] for client_id in steps}
        found = carry_out(orders)
        answers = {order[0]: answer for order, answer in zip(orders, found, strict=True)}
    raise RuntimeError("a method gave a million orders in one round")


def encoded(message: Message) -> bytes:
    """The message as bytes; one without tensors and facts is not sent at all."""
    return encode(message) if message.tree or message.facts else b""


class _Sizes:
    """Sizes of broadcasts; one that is the same for every client is encoded once."""

    def __init__(self) -> None:
        self._last: Message | None = None
        self._bytes = 0

    def __call__(self, message: Message) -> int:
        last = self._last
        if last is None or last.tree is not message.tree or last.facts != message.facts:
            self._last, self._bytes = message, len(encoded(message))
        return self._bytes
