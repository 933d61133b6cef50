"""FedALT-select: clients train together with those like them, and alone where nobody is.

Our own composition after FedALT (arXiv 2503.11880), not a published method. Client k trains one
adapter at full strength, y = W0 x + s B_k A_k x. After each round the server folds the client's
rest of world, which is the clients like it and no others, into the adapter it starts from next:

    S_kj = mean over sites of <B_k A_k, B_j A_j> / (|B_k A_k| |B_j A_j|)   by traces of r x r blocks
    c_kj = (S_kj - tau) / width, cut to [0, 1]          c_kk = 1
    c_kj = 0 from the first j on, by falling S_kj, that is less alike by `gap` than the one before
    B_k A_k <- sum_j c_kj B_j A_j / sum_j c_kj          an exact sum of products, cut to rank r

So similarity decides how much is shared: clients all alike share one start, as in FedAvg.

1. Silence is an answer: who is like nobody is sent nothing and trains what local-only trains.
2. A client serves the adapter that it has trained, which begins where all its kin begin and ends
   on its own data; it never serves the start of a round that has not been.
3. Nobody listens or is heard before it has trained `alone` rounds: until then all adapters still
   point where the common start points.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Plan, Sum, names_of, single
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Deploy, Ledger, Local, MemoryLedger, Message, Serving
from fedalt.methods.defaults import at_once
from fedalt.methods.kin import Weights, closeness, mean_of_factors, shares, similarities, trainable
from fedalt.methods.kin_sums import sums_of_products
from fedalt.methods.lora import Lora
from fedalt.training.orders import Fit, Fitted

INDIVIDUAL = "individual"
REST_OF_WORLD = "rest_of_world"


@dataclass(frozen=True)
class Server:
    """Each client's latest upload, how often it has uploaded, and what those with kin are sent."""

    TAG: ClassVar = "fedalt-select/server"

    latest: Ledger = field(default_factory=MemoryLedger)
    uploads: Mapping[str, int] = field(default_factory=dict)
    sent: Mapping[str, Tree] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """The client's adapter, a classifier's head, and a rest of world beside them, if any."""

    TAG: ClassVar = "fedalt-select/client"

    individual: Tree
    head: Tree
    row: Tree = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FedALTSelect:
    """The method; clients that sit out a round are heard with their latest upload.

    `tau` in [-1, 1) is the similarity from which on clients hear each other, tau + `width` that
    from which on they count as much as the client itself. A client's kin, from the closest on, end
    before the first that is less alike by `gap` in (0, 2] than the one before it; no step is as
    large as 2. `alone` >= 1 rounds are plain LoRA.

    Two choices to compare with: `mean` of "factors" in the place of products, and a rest of world
    that stands `beside` the adapter, frozen and of full strength (of the closest of its kin), in
    the place of one that is folded into it.
    """

    lora: Lora = Lora()
    tau: float = 0.3
    width: float = 0.3
    gap: float = 0.2
    alone: int = 2
    mean: Literal["products", "factors"] = "products"
    beside: bool = False

    server_state = Server
    client_state = Client
    averages = False
    # What is folded in becomes part of others' adapters, whose rows are then other directions.
    mingled = renewed = True

    def __post_init__(self) -> None:
        check(self, tau="[-1, 1)", width="(0, inf)", alone="[1, inf)", gap="(0, 2]")

    def init_server(self, init: Initializer) -> Server:
        """Nobody has been heard yet."""
        return Server()

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """A drawn, the same for everyone, B zero."""
        return Client(init.adapter(self.lora.slot(INDIVIDUAL)), init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """Where the client shall start, or its rest of world; nothing where it has no kin."""
        return Message(server.sent.get(client_id, {}))

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the individual adapter from where it shall start, and send it back."""
        individual = trainable(select(message.tree, INDIVIDUAL), client.individual)
        begun = replace(client, individual=individual, row=select(message.tree, REST_OF_WORLD))
        serving = self._serving(begun)
        fitted: Fitted = yield Fit(
            serving.plan, serving.tree, names_of(serving.tree, INDIVIDUAL, HEAD)
        )
        individual, head = select(fitted.tree, INDIVIDUAL), select(fitted.tree, HEAD)
        return Client(individual, head, begun.row), Message(individual)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Compare the latest uploads of those who have been alone long enough, and sum up kin."""
        latest, uploads = server.latest, dict(server.uploads)
        for client_id, upload in replies:
            latest = latest.put(client_id, upload)
            uploads[client_id] = uploads.get(client_id, 0) + 1
        heard = {client: latest[client].tree for client in uploads if uploads[client] >= self.alone}
        kin = {
            client: closeness(similar, tau=self.tau, width=self.width, gap=self.gap)
            for client, similar in similarities(heard).items()
        }
        return Server(latest, uploads, self._means(heard, shares(kin, beside=self.beside)))

    def deploy(self, client: Client, message: Message) -> Deploy:
        """What the client has trained."""
        return at_once(self._serving(client))

    def shared(self, client: Client, message: Message) -> Serving | None:
        """What the client would begin the next round with, if it has kin."""
        slot = self.lora.slot(REST_OF_WORLD if self.beside else INDIVIDUAL)
        tree = merge(message.tree, client.head)
        return Serving(single(slot, self.lora.dropout), tree) if message.tree else None

    def without(self, server: Server, client_id: str) -> Server:
        """Who has left is heard no more."""
        uploads = {other: n for other, n in server.uploads.items() if other != client_id}
        return self.aggregate(Server(server.latest.without(client_id), uploads), ())

    def _means(self, adapters: Mapping[str, Tree], weights: Weights) -> dict[str, Tree]:
        """Clients' starts, or their rests of world."""
        slot = REST_OF_WORLD if self.beside else INDIVIDUAL
        if self.mean == "factors":
            return {who: mean_of_factors(adapters, of, slot) for who, of in weights.items()}
        return sums_of_products(adapters, weights, slot, self.lora.rank)

    def _serving(self, client: Client) -> Serving:
        tree = merge(client.individual, client.row, client.head)
        slot = self.lora.slot(INDIVIDUAL)
        if not client.row:
            return Serving(single(slot, self.lora.dropout), tree)
        slots = (slot, self.lora.slot(REST_OF_WORLD))
        return Serving(Plan(slots, Sum((1.0, 1.0)), self.lora.dropout), tree)
