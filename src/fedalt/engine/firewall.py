"""What a message must be like before it may change a state; whatever is not is `Refused`."""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import torch
from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.core.codec import CodecError, require_finite
from fedalt.core.foreign import shown
from fedalt.core.settings import Robust
from fedalt.core.tree import Name, Tree
from fedalt.core.upload_settings import Firewall as Firewall
from fedalt.engine.dry_run import Form, play, require_bound
from fedalt.methods.contract import AnyMethod, Fact, Facts, Message

WEIGHT: Final = "weight"  # the fact that says how much an upload counts in a mean
MOST_WEIGHT: Final = 1e9  # examples; nobody has more
FEWEST: Final = 3  # uploads of which a median says what is usual
FEWEST_COUNTED: Final = -1  # what stands for none
MOST_COUNTED: Final = 10**5  # rounds, clients or groups

_DTYPES: Final = (torch.float32, torch.float64)  # of what servers send: adapters and their sums


class Refused(ValueError):  # noqa: N818 - a verdict, no mistake of ours
    """A message that is not taken, and why: one sentence, fit to be shown on a terminal.

    Strangers choose what is in a message, and errors about it quote them.
    """

    def __str__(self) -> str:
        """The sentence without control characters, cut where it is too long."""
        return shown(super().__str__())


def check_size(size: int, limit: int) -> None:
    """Refuse what has more bytes than allowed, before it is looked into."""
    if size > limit:
        raise Refused(f"the upload has {size} bytes, but at most {limit} are allowed")


def check_upload(upload: Message, forms: Sequence[Form]) -> None:
    """Refuse an upload that has none of the forms, or a number that is not finite.

    A weight is above 0 and no larger than the examples that anybody could have.
    """
    form = form_of(upload, forms)
    _check_tree(upload.tree, form.tree)
    _check_facts(upload.facts, form.facts, "the upload")
    weight = upload.facts.get(WEIGHT)
    if not isinstance(weight, int | float):
        return
    if not form.counts and weight != form.facts[WEIGHT]:
        exactly = form.facts[WEIGHT]
        raise Refused(f"the upload's weight is {quoted(weight)}, expected exactly {exactly}")
    if not 0 < weight <= MOST_WEIGHT:
        raise Refused(
            f"the upload's weight is {quoted(weight)}, expected above 0 and at most {MOST_WEIGHT:g}"
        )


def check_shapes(shapes: Mapping[Name, tuple[int, ...]], forms: Sequence[Form]) -> None:
    """Refuse names and shapes that none of the forms has, before there are numbers to them."""
    expected = _form_named(shapes.keys(), forms).tree
    _check_names(shapes.keys(), expected.keys())
    for name, tensor in expected.items():
        if shapes[name] != tuple(tensor.shape):
            raise Refused(
                f"the upload has {_named(name)} as {shapes[name]}, expected {tuple(tensor.shape)}"
            )


def form_of(upload: Message, forms: Sequence[Form]) -> Form:
    """The form that an upload has by the names of its tensors, or the last."""
    return _form_named(upload.tree.keys(), forms)


def _form_named(names: Set[Name], forms: Sequence[Form]) -> Form:
    return [*forms, *(form for form in forms if form.tree.keys() == names)][-1]


def check_broadcast(message: Message, method: AnyMethod, init: Initializer, client: object) -> None:
    """Refuse a broadcast that this client, in its state, could neither train nor serve with.

    Sites, shapes and ranks fit the base model, all numbers are finite, and what the method orders
    and serves after it has exactly the tensors that its plans need.
    """
    with torch.device("meta"):  # only its facts are looked at
        first = method.broadcast(method.init_server(init), "")
    _check_facts(message.facts, first.facts, "the broadcast")
    for key, fact in message.facts.items():
        _check_number(key, fact)
    for name, tensor in message.tree.items():
        _check_place(name, tensor, message.tree, init)
    _check_finite(message.tree, "the broadcast")
    try:
        play(method.local(client, message), init, examples=1)
        served = play(method.deploy(client, message), init, examples=1)
        require_bound(served.plan, served.tree, init, "what is served")
        if (shared := method.shared(client, message)) is not None:
            require_bound(shared.plan, shared.tree, init, "what is shared")
    except Exception as error:  # whatever a method makes of what it does not expect
        raise Refused(
            f"the broadcast does not fit this client's state: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class Size:
    """How large an upload is: the norm of its tree and its weight, None where it has neither."""

    norm: float | None
    weight: float | None


def size_of(upload: Message) -> Size:
    """The norm is the root of the sum of all squares, in float64."""
    norms = [
        float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        for tensor in upload.tree.values()
    ]
    weight = upload.facts.get(WEIGHT)
    return Size(math.hypot(*norms) if norms else None, None if weight is None else float(weight))


def too_large(sizes: Mapping[str, Size], limit: float) -> dict[str, str]:
    """Who of a round's clients is refused, and why: norm or weight above `limit` times the median.

    Of fewer than three uploads nobody can tell what is usual; a median of 0 refuses nothing.
    """
    norms = {client_id: size.norm for client_id, size in sizes.items() if size.norm is not None}
    weights = {
        client_id: size.weight for client_id, size in sizes.items() if size.weight is not None
    }
    return {**_outliers("weight", weights, limit), **_outliers("norm", norms, limit)}


def _outliers(what: str, values: Mapping[str, float], limit: float) -> dict[str, str]:
    usual = median(values.values()) if len(values) >= FEWEST else 0.0
    return {
        client_id: f"the upload's {what} is {value:.6g}, more than {limit:g} times the median "
        f"{usual:.6g} of the round's {len(values)} uploads"
        for client_id, value in values.items()
        if usual and value > limit * usual
    }


@dataclass(frozen=True)
class Screening:
    """The rules of a round; `robust` takes the place of the method's mean, `trim` is its share."""

    firewall: Firewall = field(default_factory=Firewall)
    robust: Robust | None = None
    trim: float = 0.1

    def screened(
        self, open_: Callable[[], Message], size: int, forms: Sequence[Form]
    ) -> tuple[Message | None, str]:
        """An upload of `size` bytes; None and why if its size, form or numbers are rejected.

        `open_` makes a message of those bytes once they are few enough; `forms` are those that the
        method's uploads may have, see `dry_run`.
        """
        try:
            check_size(size, self.firewall.max_upload_bytes)
            message = open_()
            check_upload(message, forms)
        except Refused as error:
            return None, str(error)
        return message, ""

    def outliers(self, sizes: Mapping[str, Size]) -> dict[str, str]:
        """Who of a round's clients is rejected for an upload too large beside the others'."""
        limit = self.firewall.norm_limit
        return {} if limit is None else too_large(sizes, limit)


def _check_names(names: Set[Name], expected: Set[Name]) -> None:
    if missing := expected - names:
        raise Refused(f"the upload lacks {len(missing)} expected tensors, {_first(missing)}")
    if extra := names - expected:
        raise Refused(f"the upload has {len(extra)} unexpected tensors, {_first(extra)}")


def _check_tree(tree: Tree, expected: Tree) -> None:
    _check_names(tree.keys(), expected.keys())
    for name, wanted in expected.items():
        if tree[name].shape != wanted.shape or tree[name].dtype != wanted.dtype:
            raise Refused(
                f"the upload has {_named(name)} as {_kind(tree[name])}, expected {_kind(wanted)}"
            )
    _check_finite(tree, "the upload")


def _check_facts(facts: Facts, expected: Facts, what: str) -> None:
    if facts.keys() != expected.keys():
        raise Refused(f"{what} has the facts {quoted(sorted(facts))}, expected {sorted(expected)}")
    for key, wanted in expected.items():
        fact = facts[key]
        if type(fact) is not type(wanted):
            kinds = type(fact).__name__, type(wanted).__name__
            raise Refused(f"{what}'s fact {key!r} is a {kinds[0]}, expected a {kinds[1]}")
        if isinstance(fact, float) and not math.isfinite(fact):
            raise Refused(f"{what}'s fact {key!r} is {fact}, expected a finite number")


def _check_number(key: str, fact: Fact) -> None:
    """Whether a broadcast's fact is a number that a federation can come to.

    Methods build as many slots as a fact says: a count without a limit fills the memory.
    """
    if key == WEIGHT and isinstance(fact, int | float) and fact < 0:
        raise Refused(f"the broadcast's {WEIGHT} is {quoted(fact)}, expected at least 0")
    if type(fact) is int and not FEWEST_COUNTED <= fact <= MOST_COUNTED:
        raise Refused(
            f"the broadcast's fact {key!r} is {quoted(fact)}, expected a whole number from "
            f"{FEWEST_COUNTED} to {MOST_COUNTED}"
        )


def _check_place(name: Name, tensor: Tensor, tree: Tree, init: Initializer) -> None:
    """Whether a broadcast's tensor has a site, that site's sizes, and its partner's rank."""
    if tensor.dtype not in _DTYPES:
        raise Refused(
            f"the broadcast has {_named(name)} as {_kind(tensor)}, expected float32 or float64"
        )
    shape = init.sites.get(name.site)
    if shape is None:
        raise Refused(f"the broadcast has {_named(name)}, but the base model has no such site")
    sizes = {"A": (1, shape.d_in), "B": (0, shape.d_out), "G": (1, shape.d_in)}
    if name.factor not in sizes:
        return  # a part of a method's own, which its orders will show
    side, size = sizes[name.factor]
    if tensor.dim() != 2 or tensor.shape[side] != size:
        raise Refused(
            f"the broadcast has {_named(name)} as {_kind(tensor)}, expected {size} in place {side}"
        )
    other = tree.get(name._replace(factor="B")) if name.factor == "A" else None
    if other is not None and other.dim() == 2 and len(tensor) != other.shape[1]:
        raise Refused(
            f"the broadcast has {_named(name)} of rank {len(tensor)}, but its B of {other.shape[1]}"
        )


def _check_finite(tree: Tree, what: str) -> None:
    try:
        require_finite((f"{what}: {name}", tree[name]) for name in sorted(tree))
    except CodecError as error:
        raise Refused(str(error)) from error


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def _named(name: Name) -> str:
    return quoted(str(name))


def _first(names: Iterable[Name]) -> str:
    return f"first {_named(min(names))}"


def quoted(value: object) -> str:
    """What a stranger has sent, in short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    return short.repr(value)
