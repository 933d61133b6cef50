"""A federation without a model: a pull towards each client's own target stands for training."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Shape
from fedalt.core import tree as trees
from fedalt.core.codec import decode, encode, fields_of
from fedalt.core.seeds import generator
from fedalt.core.tree import Name, Tree
from fedalt.engine import client_work
from fedalt.engine.client_work import ClientWork
from fedalt.engine.firewall import Screening
from fedalt.engine.generators import Execute, Given, run_generators
from fedalt.engine.privacy import Protection, Release
from fedalt.engine.round import ClientRound, Outcome, run_round
from fedalt.engine.schedule import Arm
from fedalt.engine.states import client_of
from fedalt.engine.traffic import Coding, Downlink, Traffic
from fedalt.methods.contract import AnyMethod, Ledger, Serving
from fedalt.training.orders import Embed, Fit, Fitted, Found, Moments, Order, Search

T = TypeVar("T")
SITES = {"block.0.q": Shape(5, 4), "block.1.q": Shape(5, 3)}
HEADS = {Name("classifier", HEAD, "weight"): (2, 3), Name("classifier", HEAD, "bias"): (2,)}
START = Initializer(SITES, HEADS, seed=7)
USUAL = Screening()
IN_FULL = Traffic()
EXAMPLES = {"a": 10, "b": 30, "c": 60}


class MemoryStates(dict[str, Any]):
    """States in a dictionary."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.refused: list[tuple[str, str, bytes]] = []

    def begin(self) -> None:
        self.before = dict(self)

    def drop(self, key: str) -> None:
        for each in [each for each in self if f"{each}/".startswith(f"{key}/")]:
            del self[each]
            if each in self.before:
                self[each] = self.before[each]

    @contextmanager
    def spooling(self) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            yield Path(folder)

    def quarantine(self, client_id: str, reason: str, data: bytes, limit: int) -> None:
        self.refused.append((client_id, reason, data))

    def get(self, key: str, cls: type[T]) -> T | None:  # type: ignore[override]
        return super().get(key)

    def backed(self, key: str, value: T) -> T:
        return value

    def put(self, key: str, value: object) -> None:
        self[key] = value


class ByteStates(MemoryStates):
    """States that go through the codec on every way in and out; a ledger stays beside its state."""

    def get(self, key: str, cls: type[T]) -> T | None:  # type: ignore[override]
        if key not in self:
            return None
        data, ledgers = self[key]
        return decode(cls, data, given=ledgers)

    def put(self, key: str, value: object) -> None:
        names = fields_of(type(value), Ledger)
        self[key] = (encode(value, omit=names), {name: getattr(value, name) for name in names})


def pull(client_id: str, number: int, order: Order) -> Any:
    """Carry out an order without a model or data.

    A fit moves every tensor that may train half way to a target that is the client's own; prompts
    have random embeddings; a search finds its start.
    """
    match order:
        case Fit():
            moved = {}
            for name in order.train:
                stream = generator(client_id, number, name.site, name.factor)
                target = torch.randn(order.tree[name].shape, generator=stream)
                moved[name] = (order.tree[name] + target) / 2
            moments = Moments() if order.moments is None else Moments(moved, moved, 1)
            return Fitted(trees.replace(order.tree, moved), EXAMPLES.get(client_id, 20), moments)
        case Embed():
            return torch.randn(order.examples, 6, generator=generator(client_id, "references"))
        case Search():
            return Found(order.start, order.penalty(order.start))


@dataclass(frozen=True)
class Answers:
    """In the place of a local trainer: executes orders as a function does."""

    answers: Execute

    def execute(self, orders: Sequence[Given], **_: Any) -> Sequence[Any]:
        return self.answers(orders)


def one_by_one(answer: Any) -> Execute:
    """Executes orders one after the other."""
    return lambda orders: [answer(*order) for order in orders]


def run_one(steps: Generator[Order, Any, T], answer: Any, client_id: str) -> T:
    """What one client's generator returns."""
    return run_generators({client_id: steps}, one_by_one(answer))[client_id]


def run_groups(
    method: AnyMethod,
    init: Initializer,
    states: Any,
    groups: Sequence[Sequence[str]],
    execute: Execute,
    screening: Screening = USUAL,
    protection: Protection | None = None,
    release: Release | None = None,
    traffic: Traffic = IN_FULL,
) -> Outcome:
    """A round in which groups of clients train together."""
    coding = Coding(method, init, traffic, sorted(EXAMPLES))

    def train(downlink: Downlink, _: Sequence[str]) -> Iterator[Any]:
        trainer: Any = Answers(execute)
        work = ClientWork(
            Arm("own", method),
            init,
            trainer,
            states,
            0,
            sent=downlink.message,
            on_event=lambda _: None,
            protection=protection,
            coding=coding,
        )
        return chain.from_iterable(map(work.train, groups))

    cohort = list(chain.from_iterable(groups))
    return run_round(
        method,
        init,
        states,
        cohort,
        train,
        screening,
        release=release,
        coding=coding,
        heard=lambda: cohort,
    )


def simulate(
    method: AnyMethod,
    cohorts: Sequence[Sequence[str]],
    states: MemoryStates | None = None,
    train: Any = pull,
    screening: Screening = USUAL,
    traffic: Traffic = IN_FULL,
) -> tuple[MemoryStates, list[ClientRound]]:
    """Run a round for every cohort; the states afterwards and what each client's round cost."""
    states = MemoryStates() if states is None else states
    costs: list[ClientRound] = []
    for cohort in cohorts:
        groups = [sorted(cohort)]
        execute = one_by_one(train)
        outcome = run_groups(method, START, states, groups, execute, screening, traffic=traffic)
        costs += outcome.clients
    return states, costs


def servings(
    method: AnyMethod,
    init: Initializer,
    states: MemoryStates,
    client_id: str,
    train: Any = pull,
    traffic: Traffic = IN_FULL,
) -> tuple[Serving, Serving | None]:
    """What a client would serve now, and the shared part alone if there is one."""
    client = client_of(method, init, states, client_id)
    message = Coding(method, init, traffic).downlink(states).message(client_id)
    return client_work.servings(method, client, message, client_id, one_by_one(train))


def served(
    method: AnyMethod,
    states: MemoryStates,
    clients: Sequence[str],
    train: Any = pull,
    traffic: Traffic = IN_FULL,
) -> dict[str, Serving]:
    """What every client would serve."""
    return {
        client_id: servings(method, START, states, client_id, train, traffic)[0]
        for client_id in clients
    }


def trees_of(value: object) -> Tree:
    """All tensors of a state, whatever its fields are called; the slot tells the field too."""
    return trees.merge(
        *(
            {name._replace(slot=f"{field}/{name.slot}"): tensor for name, tensor in part.items()}
            for field, part in vars(value).items()
            if isinstance(part, dict) and all(isinstance(key, Name) for key in part)
        )
    )


def assert_same_servings(
    left: Mapping[str, Serving], right: Mapping[str, Serving], tolerance: float = 0.0
) -> None:
    """Equal plans, references and trees, the trees bit for bit unless a tolerance is given."""
    assert left.keys() == right.keys()
    for client_id in left:
        assert left[client_id].plan == right[client_id].plan
        ours, theirs = left[client_id].references, right[client_id].references
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
        trees.require_same_names(left[client_id].tree, right[client_id].tree, client_id)
        for name, tensor in left[client_id].tree.items():
            torch.testing.assert_close(
                tensor, right[client_id].tree[name], rtol=0, atol=tolerance, msg=str(name)
            )
