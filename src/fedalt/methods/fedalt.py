"""FedALT: an individual adapter, a frozen rest-of-world adapter, and a private mixer of the two.

Bian, Wang, Zhang, Xu: "FedALT: Federated Fine-Tuning through Adaptive Local Training with
Rest-of-World LoRA", arXiv 2503.11880. With K clients, for client k on every site:

    rest of world   A_R = 1/(K-1) sum_{m != k} A_m,  B_R likewise                      (eq. 3)
    forward         (a, 1-a) = softmax(G_k x)
                    y = W0 x + s a B_k A_k x + s (1-a) B_R A_R x                       (eq. 4)
    local step      descend on A_k, B_k, G_k; A_R, B_R stay frozen, gradient flows through them

The server sends every client the same: the *total* of all latest individual adapters and its
weight; only whether the reader's own is in it differs. If so, the client subtracts what it last
uploaded, which is its individual adapter, and divides. Totals are float64: with float32 one client
of large norm would ruin everybody's difference.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, MIXER, Mixer, Plan, names_of
from fedalt.core.tree import Tree, accumulate, apply, copy, merge, move, select
from fedalt.methods.contract import Deploy, Ledger, Local, MemoryLedger, Message, Serving
from fedalt.methods.defaults import at_once
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.training.orders import Fit, Fitted

INDIVIDUAL = "individual"
REST_OF_WORLD = "rest_of_world"


@dataclass(frozen=True)
class Server:
    """Sum of all latest uploads (float64) and of their weights, how many, and the uploads.

    `size` is how many clients the federation began with, those that have not yet uploaded included,
    less those that left; 0 where that is not known. Who joins later is in `clients` alone.
    """

    TAG: ClassVar = "fedalt/server"

    total: Tree = field(default_factory=dict)
    weight: float = 0.0
    clients: int = 0
    latest: Ledger = field(default_factory=MemoryLedger)
    size: int = 0


@dataclass(frozen=True)
class Client:
    """`weight` is what this client's last upload counts: 0 before the first."""

    TAG: ClassVar = "fedalt/client"

    individual: Tree
    mixer: Tree
    head: Tree
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FedALT:
    """The method of the paper; its ablations are in `fedalt_ablations.py`."""

    lora: Lora = Lora()
    weighting: Weighting = "uniform"

    server_state = Server
    client_state = Client
    averages = False

    def init_server(self, init: Initializer) -> Server:
        """Before anyone has uploaded, the total is empty."""
        return Server(size=init.clients)

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """A drawn, the same for everyone, B zero: the individual adapter begins as no change."""
        return Client(init.adapter(self.lora.slot(INDIVIDUAL)), init.mixer(2), init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The same tree for every client, so that it can be encoded once."""
        included = client_id in server.latest
        clients = max(server.size or 2, server.clients)  # newcomers may be more than are missing
        facts = {"weight": server.weight, "clients": clients, "included": included}
        return Message(server.total, facts)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train adapter and mixer against the frozen rest of world; upload the adapter."""
        serving = self._serving(client, message)
        trained = names_of(serving.tree, INDIVIDUAL, MIXER, HEAD)
        fitted: Fitted = yield Fit(serving.plan, serving.tree, trained)
        individual, mixer, head = (select(fitted.tree, s) for s in (INDIVIDUAL, MIXER, HEAD))
        weight = weight_of(fitted, self.weighting)
        return Client(individual, mixer, head, weight), Message(individual, {"weight": weight})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Put each client's new upload in the place of its last one, in the total too."""
        after = replace(server, total=copy(server.total))
        for client_id, upload in replies:
            if client_id in after.latest:
                after = _count(after, after.latest[client_id], -1)
            after = replace(_count(after, upload, 1), latest=after.latest.put(client_id, upload))
        return after

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The newest rest of world with the mixer trained against the one before, as published."""
        return at_once(self._serving(client, message))

    def shared(self, client: Client, message: Message) -> Serving:
        row = rest_of_world(client.individual, client.weight, message)
        return Serving(self.lora.plan(REST_OF_WORLD), merge(row, client.head))

    def without(self, server: Server, client_id: str) -> Server:
        """The total once more, of all uploads but this client's: nothing is left by rounding."""
        latest = server.latest.without(client_id)
        rest = self.aggregate(Server(), ((other, latest[other]) for other in latest.clients()))
        # A leaving that was cut short is done again: who is out of the total is out of the size.
        gone = server.clients - rest.clients
        size = max(server.size, server.clients) - gone if server.size else 0
        return replace(rest, size=size, latest=latest)

    def _serving(self, client: Client, message: Message) -> Serving:
        """Individual adapter and rest of world, weighed by the mixer (eq. 4)."""
        row = rest_of_world(client.individual, client.weight, message)
        slots = (self.lora.slot(INDIVIDUAL), self.lora.slot(REST_OF_WORLD))
        tree = merge(client.individual, row, client.mixer, client.head)
        return Serving(Plan(slots, Mixer(), self.lora.dropout), tree)


def rest_of_world(individual: Tree, own_weight: float, message: Message) -> Tree:
    """(total - own) / (weight - own weight) (eq. 3), or, where there are no others, a zero adapter.

    "No others" is round 0, or a federation of one.
    """
    own = own_weight if message.facts["included"] else 0.0
    others = float(message.facts["weight"]) - own
    if others <= 0:
        zero = {n: t if n.factor == "A" else t.new_zeros(t.shape) for n, t in individual.items()}
        return move(zero, INDIVIDUAL, REST_OF_WORLD)
    row = apply(
        lambda total, a: total.sub(a.double(), alpha=own).mul_(1 / others).float(),
        message.tree,
        individual,
    )
    return move(row, INDIVIDUAL, REST_OF_WORLD)


def _count(server: Server, upload: Message, times: int) -> Server:
    """The server with an upload put into its total, or taken out; the total is changed in place."""
    weight = times * float(upload.facts["weight"])
    total = accumulate(server.total, upload.tree, weight)
    clients = server.clients + times
    return replace(server, total=total, weight=server.weight + weight, clients=clients)
