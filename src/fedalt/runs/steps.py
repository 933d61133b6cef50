"""Rounds for equal steps: what a method trains in a round, found without a model or data.

A plain method trains once in a round, for the local epochs. What another trains beyond that, a
second time in a round or before it serves, is paid for with rounds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import Shape
from fedalt.core.seeds import generator
from fedalt.core.tree import Tree
from fedalt.engine.generators import Given, run_generators
from fedalt.methods.contract import AnyMethod
from fedalt.runs.settings import Settings, lora_of
from fedalt.training.orders import Embed, Fit, Fitted, Found, Moments, Search

_CLIENTS = ("a", "b", "c")


def with_equal_steps(settings: Settings) -> Settings:
    """The settings with the most rounds whose steps are no more than a plain method's.

    Steps that a client takes before it serves count once. One round is the fewest. Where no number
    of rounds takes exactly as many steps, the method takes fewer.
    """
    schedule, epochs = settings.rounds, settings.training.local_epochs
    allowed = schedule.participation * schedule.rounds * epochs
    rounds, taken = 1, 0.0
    passes = passes_of(settings.method, schedule.rounds, epochs)
    for done, (in_round, before_serving) in enumerate(passes, 1):
        taken += schedule.participation * in_round
        if taken + before_serving <= allowed + 1e-6:
            rounds = done
    return replace(settings, rounds=replace(schedule, rounds=rounds))


def passes_of(method: AnyMethod, rounds: int, epochs: int) -> Iterator[tuple[int, int]]:
    """Passes over a client's data in each round, and those before it would serve after it.

    The method is played by three clients on one small layer; in the place of training its tensors
    move at random. Where clients differ, the one with most counts.
    """
    ranks = getattr(method, "ranks", {}).values()
    width = 2 * max(lora_of(method).rank, *ranks, 1)
    init = Initializer({"layer": Shape(width, width)}, {}, 0, len(_CLIENTS))
    server = method.init_server(init)
    clients: dict[str, Any] = {client: method.init_client(init, client) for client in _CLIENTS}
    for round_ in range(rounds):
        passes = dict.fromkeys(_CLIENTS, 0)
        local = {
            client: method.local(state, method.broadcast(server, client))
            for client, state in clients.items()
        }
        ends = run_generators(local, partial(_moved, passes, epochs, round_))
        clients = {client: state for client, (state, _) in ends.items()}
        server = method.aggregate(server, [(client, sent) for client, (_, sent) in ends.items()])
        before = dict.fromkeys(_CLIENTS, 0)
        deploy = {
            client: method.deploy(state, method.broadcast(server, client))
            for client, state in clients.items()
        }
        run_generators(deploy, partial(_moved, before, epochs, round_))
        yield max(passes.values()), max(before.values())


def _moved(passes: dict[str, int], epochs: int, round_: int, orders: Sequence[Given]) -> list[Any]:
    """Answers orders without training, and counts the passes that they order."""
    answers: list[Any] = []
    for client, number, order in orders:
        stream = generator(0, client, round_, number)
        match order:
            case Fit():
                passes[client] += epochs if order.epochs is None else order.epochs
                moved: Tree = {
                    name: tensor + 0.1 * torch.randn(tensor.shape, generator=stream)
                    if name in order.train
                    else tensor
                    for name, tensor in order.tree.items()
                }
                answers.append(Fitted(moved, 10, Moments()))
            case Embed():
                answers.append(torch.randn(order.examples, 2, generator=stream))
            case Search():
                answers.append(Found(order.start, 0.0))
    return answers
