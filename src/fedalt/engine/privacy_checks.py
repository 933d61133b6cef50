"""Whether a method's rounds can be private, found by playing it on two sites of a few numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import Shape
from fedalt.core import tree as trees
from fedalt.core.seeds import generator
from fedalt.core.tree import Tree
from fedalt.core.upload_settings import Privacy
from fedalt.engine.generators import run_one
from fedalt.methods.contract import AnyMethod, Message
from fedalt.training.clipping import require_clippable
from fedalt.training.orders import Embed, Fit, Fitted, Found, Moments, Order, Search

_CLIENTS: Final = ("a", "b", "c")
_TOY: Final = Initializer(
    {"one": Shape(4, 3), "two": Shape(3, 5)}, {}, seed=0, clients=len(_CLIENTS)
)


@dataclass(frozen=True)
class Fits:
    """The most that a client trains in a round: fits, epochs (None: the run's), spared examples."""

    count: int
    epochs: int | None
    spare: float

    def count_in(self, number: int, fit: Fit) -> bool:
        """Whether the fit of this number in a client's round is one of those."""
        longer = fit.epochs is not None and (self.epochs is None or fit.epochs > self.epochs)
        return number < self.count and not longer and fit.spare <= self.spare


def adds_up(method: AnyMethod) -> bool:
    """Whether what a method sends is the sum of everybody's latest upload, times its weight."""
    try:
        first, second, third = (_Play(method, number).round(("a", "b"))[0] for number in range(3))
        server = method.aggregate(method.init_server(_TOY), first.items())
        server = method.aggregate(server, [("a", second["a"]), ("c", third["a"])])
        latest = [second["a"], first["b"], third["a"]]
        summed: Tree = {}
        for upload in latest:
            trees.accumulate(summed, upload.tree, float(upload.facts["weight"]))
        sent = method.broadcast(server, "a").tree
        gaps = trees.subtract(trees.cast(sent, torch.float64), summed)
    except Exception:  # whatever a method makes of what it does not expect
        return False
    return bool(gaps) and all(bool((gap.abs() < 1e-6).all()) for gap in gaps.values())


def moves_by_training_alone(method: AnyMethod) -> bool:
    """Whether a client that learns nothing sends what it has sent last, whatever it receives.

    Only then does a bound on what training moves bound what a sum of latest uploads moves by.
    """
    play = _Play(method, 0)
    play.round(_CLIENTS)
    last, _ = play.round(_CLIENTS)
    play.moves = False
    again, _ = play.round(_CLIENTS)
    return all(_are_small(trees.subtract(again[who].tree, last[who].tree)) for who in _CLIENTS)


def mean_suffices(method: AnyMethod) -> bool:
    """Whether a server sends the same if each upload is exchanged for the mean of all.

    Of this round's where the method averages, else of everybody's latest.
    """
    play, blind = _Play(method, 0), method.init_server(_TOY)
    latest: dict[str, Message] = {}
    try:
        for cohort in (_CLIENTS, _CLIENTS, _CLIENTS[:2], _CLIENTS):
            uploads, _ = play.round(cohort)
            latest = {**({} if method.averages else latest), **uploads}
            facts = {frozenset(upload.facts.items()) for upload in latest.values()}
            mean: Tree = {}
            for upload in latest.values():
                trees.accumulate(mean, upload.tree, 1 / len(latest))
            alike = {
                who: Message(trees.cast(mean, torch.float32), upload.facts)
                for who, upload in latest.items()
            }
            blind = method.aggregate(blind, sorted(alike.items()))
            for who in cohort:
                seen, told = method.broadcast(play.server, who), method.broadcast(blind, who)
                gaps = trees.subtract(seen.tree, told.tree)
                if len(facts) > 1 or seen.facts != told.facts or not _are_small(gaps):
                    return False
    except Exception:  # whatever a method makes of what it does not expect
        return False
    return True


def _are_small(gaps: Tree) -> bool:
    return all(bool((gap.abs() < 1e-4).all()) for gap in gaps.values())


def weighs_alike(method: AnyMethod) -> bool:
    """Whether all uploads weigh 1, however many examples are behind them."""
    few, many = (_Play(method, 0, examples=count).round(("a",))[0]["a"] for count in (1, 7))
    return few.facts.get("weight") == many.facts.get("weight") == 1.0


def fits_of(method: AnyMethod, rounds: int) -> Fits:
    """What a client trains in a round at most. Raises ValueError where DP-SGD does not cover it.

    That is a step or a penalty of a method's own, and an upload, or what is trained for one, that
    depends on what else it has asked its data.
    """
    play, other = (_Play(method, 0, looks=number) for number in range(2))
    fits: list[list[Fit]] = []
    for _ in range(rounds):  # all of them: a method may begin another stage at any time
        uploads, ordered = play.round(_CLIENTS)
        unlike, differently = other.round(_CLIENTS)
        if not (_sends_alike(uploads, unlike) and _trains_alike(ordered, differently)):
            raise ValueError(
                "what this method uploads depends on more of a client's texts than their gradients"
            )
        fits += ordered
    every = [fit for of_client in fits for fit in of_client]
    for fit in every:
        require_clippable(fit)
    epochs = max((fit.epochs for fit in every if fit.epochs is not None), default=None)
    return Fits(max(map(len, fits)), epochs, max(fit.spare for fit in every))


def _sends_alike(one: dict[str, Message], other: dict[str, Message]) -> bool:
    """Whether all uploads are the same, the facts beside their trees too."""
    return all(
        trees.equal(one[who].tree, other[who].tree) and one[who].facts == other[who].facts
        for who in one
    )


def _trains_alike(one: list[list[Fit]], other: list[list[Fit]]) -> bool:
    """Whether all clients train the same: its noise hides texts, not a choice made before it."""
    if [len(of_client) for of_client in one] != [len(of_client) for of_client in other]:
        return False
    pairs = zip(chain.from_iterable(one), chain.from_iterable(other), strict=True)
    return all(
        (left.plan, left.train) == (right.plan, right.train)
        and trees.equal(left.compose(left.tree), right.compose(right.tree))
        for left, right in pairs
    )


class _Play:
    """A federation of three clients whose training moves all that trains by random numbers.

    What else it asks its data is answered at random, unlike for other `looks`. Where nothing
    `moves`, training leaves all as it was.
    """

    moves: bool = True

    def __init__(self, method: AnyMethod, seed: int, *, looks: int = 0, examples: int = 3) -> None:
        self.method, self.examples = method, examples
        self.stream, self.looks = generator("privacy", seed), generator("looks", looks)
        self.server = method.init_server(_TOY)
        self.states = {who: method.init_client(_TOY, who) for who in _CLIENTS}

    def round(self, cohort: Sequence[str]) -> tuple[dict[str, Message], list[list[Fit]]]:
        """The uploads of a round, and the fits that each client has ordered."""
        uploads: dict[str, Message] = {}
        fits: list[list[Fit]] = []
        for who in cohort:
            ordered: list[Fit] = []
            fits.append(ordered)
            sent = self.method.broadcast(self.server, who)
            steps = self.method.local(self.states[who], sent)
            self.states[who], uploads[who] = run_one(steps, partial(self._answer, fits=ordered))
        self.server = self.method.aggregate(self.server, sorted(uploads.items()))
        return uploads, fits

    def _answer(self, order: Order, fits: list[Fit]) -> Fitted | Tensor | Found:
        match order:
            case Fit():
                fits.append(order)
                return Fitted(self._moved(order), self.examples, Moments())
            case Embed():
                return torch.randn((order.examples, 2), generator=self.looks)
            case Search():
                *found, objective = torch.randn(len(order.start) + 1, generator=self.looks).tolist()
                return Found(tuple(found), objective)

    def _moved(self, fit: Fit) -> Tree:
        if not self.moves:
            return dict(fit.tree)
        return {
            name: tensor + torch.randn(tensor.shape, generator=self.stream) * (name in fit.train)
            for name, tensor in sorted(fit.tree.items())
        }


def faults(method: AnyMethod, privacy: Privacy, rounds: int) -> Iterator[str]:
    """Why a method's rounds cannot be private in this way."""
    if privacy.unit == "client":
        if not (method.averages or adds_up(method)):
            yield "its server does more with uploads than to add them up or to average them"
        elif not (method.averages or moves_by_training_alone(method)):
            yield "a part of an upload begins from what the server sent, which no clip bounds"
        elif not weighs_alike(method):
            yield 'an upload\'s weight tells how many examples a client has; weighting = "uniform"'
    else:
        try:
            fits_of(method, rounds)
        except ValueError as error:
            yield str(error)
