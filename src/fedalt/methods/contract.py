"""What a method is: pure functions over states, which describe training and never perform it."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import Plan
from fedalt.core.tree import Tree
from fedalt.training.orders import Order

Fact = bool | int | float | str
Facts = Mapping[str, Fact]


@dataclass(frozen=True)
class Message:
    """What crosses the wire, either way: a tree and a few named numbers."""

    TAG: ClassVar = "message"

    tree: Tree
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Serving:
    """What a client would use if the federation stopped now; all that scoring and export need.

    `references` (examples, hidden) are what a plan that weighs slots by similarity compares with.
    """

    TAG: ClassVar = "serving"

    plan: Plan
    tree: Tree
    references: Tensor | None = None


class Ledger(Protocol):
    """The latest upload of every client ever seen; a store backs it with files."""

    def __contains__(self, client_id: object) -> bool:
        """Whether this client has ever uploaded."""

    def __getitem__(self, client_id: str) -> Message:
        """The client's latest upload."""

    def put(self, client_id: str, message: Message) -> "Ledger":
        """A ledger in which the client's entry is this message."""

    def clients(self) -> Sequence[str]:
        """Every client with an entry, sorted."""

    def without(self, client_id: str) -> "Ledger":
        """A ledger in which the client has no entry."""


class MemoryLedger(dict[str, Message]):
    """A ledger for tests and small federations."""

    def put(self, client_id: str, message: Message) -> "MemoryLedger":
        return MemoryLedger({**self, client_id: message})

    def clients(self) -> list[str]:
        return sorted(self)

    def without(self, client_id: str) -> "MemoryLedger":
        return MemoryLedger({key: value for key, value in self.items() if key != client_id})


S = TypeVar("S")
C = TypeVar("C")
# What an order is answered with depends on the order, which a generator's type cannot tell.
Local = Generator[Order, Any, tuple[C, Message]]
Deploy = Generator[Order, Any, Serving]


class Method(Protocol[S, C]):
    """A federated algorithm: the server's half and the client's half.

    S and C are the method's own frozen dataclasses of trees and numbers. What is not in a returned
    state does not exist: that makes resuming, the wire and the tests one and the same thing.

    A method whose clients train something else from round to round, such as other rank rows or the
    other factor, says so with `renewed = True`: an optimiser's moments are not carried over.

    A method whose server can forget a client's upload, but whose clients have gone on from means
    or sums with it in them, says so with `mingled = True`: that does not take out what it put in.
    """

    @property
    def server_state(self) -> type[S]:
        """The class of the server's state, which the codec restores it to."""

    @property
    def client_state(self) -> type[C]:
        """The class of a client's state."""

    @property
    def averages(self) -> bool:
        """Whether the server uses the uploads of a round for nothing but their weighted mean.

        They then hold the same names and shapes, but for those that hold no tensors at all, and
        another centre can take the mean's place.
        """

    def init_server(self, init: Initializer) -> S:
        """The server's state before round 0."""

    def init_client(self, init: Initializer, client_id: str) -> C:
        """A client's state before its first round."""

    def broadcast(self, server: S, client_id: str) -> Message:
        """What the server sends one client."""

    def local(self, client: C, message: Message) -> Local[C]:
        """One client's round: yields orders to train, returns its new state and its upload.

        Names and shapes of both do not depend on any tensor's numbers: what an upload must look
        like is found by playing this on tensors that have none.
        """

    def aggregate(self, server: S, replies: Iterable[tuple[str, Message]]) -> S:
        """The server's state after a round; replies come sorted by client and only once."""

    def deploy(self, client: C, message: Message) -> Deploy:
        """What the client would serve now; leaves its state alone."""

    def shared(self, client: C, message: Message) -> Serving | None:
        """The shared part alone, without what the client keeps; None where nothing is shared."""

    def without(self, server: S, client_id: str) -> S | None:
        """The server's state without this client's upload; None where it cannot be told apart."""


AnyMethod = Method[Any, Any]
