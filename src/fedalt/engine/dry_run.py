"""What a client's half of a method does with a broadcast, found without any model or data."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import Plan
from fedalt.core.tree import Tree, on
from fedalt.engine.generators import run_one
from fedalt.methods.contract import AnyMethod, Facts, Message
from fedalt.training.orders import Embed, Fit, Fitted, Found, Moments, Order, Search

T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """What an upload looks like: names, shapes and dtypes of its tree, keys and types of its facts.

    The tree lies on the meta device, without numbers. `counts` says that the fact "weight" depends
    on the client's number of examples; where it does not, it is known exactly. `trained` are how
    many numbers of each slot and factor are trained for it.
    """

    tree: Tree
    facts: Facts
    counts: bool
    trained: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def same(self, other: "Form") -> bool:
        """Whether an upload that has one form has the other too, and comes of equal training."""
        kinds = [
            {name: (tensor.shape, tensor.dtype) for name, tensor in form.tree.items()}
            for form in (self, other)
        ]
        types = [{key: type(fact) for key, fact in form.facts.items()} for form in (self, other)]
        return kinds[0] == kinds[1] and types[0] == types[1] and self.trained == other.trained


def dry_run(
    method: AnyMethod, init: Initializer, client_id: str, message: Message
) -> tuple[Form, ...]:
    """The forms that a client's upload may have after this broadcast: one, or two.

    The method's own `local` is played on tensors that have shapes and no numbers: by a newcomer
    with one example, and by who has been there before with two, as the server sees neither a
    client's state nor its data.
    """
    with torch.device("meta"):
        sent = Message(on(message.tree, "meta"), message.facts)

        def once(client: Any, examples: int) -> tuple[Any, Form]:
            trained: dict[tuple[str, str], int] = {}
            steps = method.local(client, sent)
            client, upload = play(steps, init, examples=examples, trained=trained)
            return client, Form(upload.tree, upload.facts, counts=False, trained=trained)

        client, newcomers = once(method.init_client(init, client_id), 1)
        _, known = once(client, 2)
        if "weight" in known.facts and "weight" not in newcomers.facts:
            again = once(client, 1)[1]
        else:
            again = newcomers
    counts = again.facts.get("weight") != known.facts.get("weight")
    forms = replace(newcomers, counts=counts), replace(known, counts=counts)
    return forms[1:] if forms[0].same(forms[1]) else forms


@dataclass
class DryRuns:
    """Plays a method once for all clients that begin alike and are sent alike.

    What `local` does depends on nothing but the client's state and the broadcast.
    """

    method: AnyMethod
    init: Initializer
    _known: dict[object, tuple[Form, ...]] = field(default_factory=dict)

    def __call__(self, client_id: str, message: Message) -> tuple[Form, ...]:
        """See `dry_run`."""
        first = self.method.init_client(self.init, client_id)
        key = repr((_outline(first), _outline(message)))
        if key not in self._known:
            self._known[key] = dry_run(self.method, self.init, client_id, message)
        return self._known[key]


def _outline(value: Any) -> object:
    """A value with shapes in the place of tensors."""
    match value:
        case Tensor():
            return tuple(value.shape), value.dtype
        case Mapping():
            return sorted((str(key), _outline(part)) for key, part in value.items())
        case _ if is_dataclass(value):
            return type(value).__name__, _outline(vars(value))
        case _:
            return value


def play(
    steps: Generator[Order, Any, T],
    init: Initializer,
    *,
    examples: int,
    trained: dict[tuple[str, str], int] | None = None,
) -> T:
    """A method's orders to their end, all training answered with what it would begin with.

    How many numbers of each slot and factor would be trained is put into `trained`. Raises
    ValueError for training whose tensors are not those that its plan needs.
    """

    def answer(order: Order) -> Fitted | Tensor | Found:
        match order:
            case Fit():
                require_bound(order.plan, order.compose(order.tree), init, "training")
                if trained is not None:
                    trained.update(order.trained_numbers)
                return Fitted(order.tree, examples, Moments())
            case Embed():
                return torch.zeros(order.examples, 1)  # how wide, only a model could tell
            case Search():
                return Found(order.start, 0.0)

    return run_one(steps, answer)


def require_bound(plan: Plan, bound: Tree, init: Initializer, what: str) -> None:
    """ValueError unless a tree has exactly the tensors that a plan needs to be bound."""
    needed = {**plan.shapes(init.sites), **init.heads}
    if missing := needed.keys() - bound.keys():
        raise ValueError(f"{what} lacks {len(missing)} tensors, first {str(min(missing))!r}")
    if extra := bound.keys() - needed.keys():
        raise ValueError(f"{what} has {len(extra)} tensors too many, first {str(min(extra))!r}")
    for name, tensor in bound.items():
        if tuple(tensor.shape) != needed[name] or tensor.dtype != torch.float32:
            raise ValueError(
                f"{what} has {str(name)!r} as {tuple(tensor.shape)} of {tensor.dtype}, "
                f"expected {needed[name]} of torch.float32"
            )
