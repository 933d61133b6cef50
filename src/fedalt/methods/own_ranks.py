"""What methods for clients of unequal ranks share: all but what their servers make of the uploads.

A client draws, receives, trains and uploads as many rank rows as it has. All clients have one
scaling s = alpha / rank, whatever their own rank r_k (their slot's alpha is s r_k), so that
products may be added without it. A method's class names the functions that it takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Slot, names_of, single
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.lora import weight_of
from fedalt.methods.rank_rows import fill_up, first_rows, rank_of
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"


@dataclass(frozen=True)
class Server:
    """What the cohort's adapters became; empty before round 0 is over.

    The rank may differ from site to site.
    """

    TAG: ClassVar = "unequal-ranks/server"

    adapter: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """`draw` fills the rows that the server has nothing for; its rank is the client's."""

    TAG: ClassVar = "unequal-ranks/client"

    draw: Tree
    head: Tree


def require_ranks(ranks: Mapping[str, int]) -> None:
    """Raise ValueError for a rank below 1; `ranks` are by client id."""
    for client_id, rank in ranks.items():
        if rank < 1:
            raise ValueError(f"ranks: {client_id!r} has rank {rank}, but a rank is at least 1")


def rank_for(self: Any, client_id: str) -> int:
    """A client's own rank: that of `ranks`, or that of `lora`."""
    rank: int = self.ranks.get(client_id, self.lora.rank)
    return rank


def largest_rank(self: Any) -> int:
    """The largest rank that a client may have."""
    largest: int = max((self.lora.rank, *self.ranks.values()))
    return largest


def own_slot(self: Any, rank: int) -> Slot:
    """A slot of a client's own rank and the scaling of all."""
    return Slot(SHARED, rank, self.lora.slot(SHARED).scaling * rank)


def first_draw(self: Any, init: Initializer, client_id: str) -> Tree:
    """The first rows of one draw for all clients: row j begins the same wherever there is one.

    B is zero.
    """
    whole = init.adapter(Slot(SHARED, largest_rank(self), self.lora.alpha))
    return first_rows(whole, rank_for(self, client_id))


def nothing_yet(self: Any, init: Initializer) -> Server:
    """A server's state before round 0: every client begins with its own draw."""
    return Server()


def drawn_client(self: Any, init: Initializer, client_id: str) -> Client:
    """A client's state before its first round."""
    return Client(first_draw(self, init, client_id), init.head())


def send_own_rows(self: Any, server: Server, client_id: str) -> Message:
    """As many rows as the client has."""
    return Message(first_rows(server.adapter, rank_for(self, client_id)))


def train_own_rows(self: Any, client: Client, message: Message) -> Local[Client]:
    """Train an adapter of the client's rank and send it back."""
    before = serve_own_rows(self, client, message)
    fitted: Fitted = yield Fit(before.plan, before.tree, names_of(before.tree, SHARED, HEAD))
    upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
    return Client(client.draw, select(fitted.tree, HEAD)), upload


def serve_own_rows(self: Any, client: Client, message: Message) -> Serving:
    """The server's adapter as this client gets it; rows that the server lacks are as drawn."""
    own = rank_of(client.draw)
    adapter = fill_up(first_rows(message.tree, own), client.draw)
    return Serving(single(own_slot(self, own), self.lora.dropout), merge(adapter, client.head))
