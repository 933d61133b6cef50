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
from typing import ClassVar, Literal

import torch

from fedalt.adapters.plan import HEAD, MIXER, Mixer, Plan, Sum, names_of, single
from fedalt.adapters.start import MixerInit, Start
from fedalt.core.tree import Tree, accumulate, cast, copy, in_blocks, merge, move, scale, select
from fedalt.methods.contract import (
    Deploy,
    Ledger,
    Local,
    MemoryLedger,
    Message,
    Serving,
)
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.training.orders import Fit, Fitted

INDIVIDUAL = "individual"
REST_OF_WORLD = "rest_of_world"


@dataclass(frozen=True)
class Server:
    """Sum of all latest uploads (float64) and of their weights, how many, and the uploads.

    `size` is how many clients the federation has, those that have not yet uploaded included; 0
    where that is not known.
    """

    TAG: ClassVar = "fedalt/server"

    total: Tree = field(default_factory=dict)
    weight: float = 0.0
    clients: int = 0
    latest: Ledger = field(default_factory=MemoryLedger)
    size: int = 0


@dataclass(frozen=True)
class Client:
    """`weight` is what this client's last upload counts: 0 before the first.

    `second` is where a rest of world that is trained begins as long as there are no others.
    """

    TAG: ClassVar = "fedalt/client"

    individual: Tree
    mixer: Tree
    head: Tree
    weight: float = 0.0
    second: Tree = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FedALT:
    """The method and its ablations (the paper's section on ablations).

    `row`: the frozen adapter is the mean of the others, or of everybody ("global_mean").
    `train_row`: train both adapters; the trained rest of world is forgotten after the round.
    `gate`: the mixer, or fixed weights: one half, or 1/K for the individual adapter, K being all
    clients of the federation from the first round on.
    `share_mixer`: average the mixers over the clients instead of keeping them private.
    `shared_start`: all clients draw the same first A; the authors' code draws one for each.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    row: Literal["rest_of_world", "global_mean"] = "rest_of_world"
    train_row: bool = False
    gate: Literal["mixer", "half", "one_over_clients"] = "mixer"
    share_mixer: bool = False
    mixer_init: MixerInit = "kaiming"
    shared_start: bool = True

    server_state = Server
    client_state = Client
    averages = False

    def init_server(self, start: Start) -> Server:
        """Before anyone has uploaded, the total is empty."""
        return Server(size=start.clients)

    def init_client(self, start: Start, client_id: str) -> Client:
        """A drawn, B zero: the individual adapter starts as no change at all."""
        return Client(
            individual=start.adapter(
                self.lora.slot(INDIVIDUAL), only_for="" if self.shared_start else client_id
            ),
            mixer=start.mixer(2, self.mixer_init) if self.gate == "mixer" else {},
            head=start.head(),
            second=start.adapter(self.lora.slot(REST_OF_WORLD), apart=True)
            if self.train_row
            else {},
        )

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The same tree for every client, so that it can be encoded once."""
        included = client_id in server.latest
        clients = max(server.size or 2, server.clients)  # newcomers add to a size that is known
        facts = {"weight": server.weight, "clients": clients, "included": included}
        return Message(server.total, facts)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train adapter and mixer against the frozen rest of world; upload the adapter."""
        row = self.rest_of_world(client, message)
        mixer = self._mixer(client, message)
        tree = merge(client.individual, row, mixer, client.head)
        trained = (INDIVIDUAL, MIXER, HEAD, *((REST_OF_WORLD,) if self.train_row else ()))
        fitted: Fitted = yield Fit(self._plan(message), tree, names_of(tree, *trained))
        individual = select(fitted.tree, INDIVIDUAL)
        mixer = select(fitted.tree, MIXER)
        weight = weight_of(fitted, self.weighting)
        upload = merge(individual, mixer) if self.share_mixer else individual
        head = select(fitted.tree, HEAD)
        after = replace(client, individual=individual, mixer=mixer, head=head, weight=weight)
        return after, Message(upload, {"weight": weight})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Put each client's new upload in the place of its last one, in the total too."""
        total, weight = copy(server.total), server.weight
        clients, latest = server.clients, server.latest
        for client_id, upload in replies:
            if client_id in latest:
                last = latest[client_id]
                _count(total, last, -1)
                weight -= float(last.facts["weight"])
                clients -= 1
            _count(total, upload, 1)
            weight += float(upload.facts["weight"])
            clients += 1
            latest = latest.put(client_id, upload)
        return Server(total, weight, clients, latest, server.size)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The newest rest of world with the mixer trained against the one before, as published."""
        row = self.rest_of_world(client, message)
        tree = merge(client.individual, row, self._mixer(client, message), client.head)
        return Serving(self._plan(message), tree)
        yield  # deploy is a generator for methods that train before they serve

    def shared(self, client: Client, message: Message) -> Serving | None:
        """The rest-of-world adapter alone."""
        tree = merge(self.rest_of_world(client, message), client.head)
        return Serving(single(self.lora.slot(REST_OF_WORLD), self.lora.dropout), tree)

    def without(self, server: Server, client_id: str) -> Server:
        """The total once more, of all uploads but this client's: nothing is left by rounding."""
        latest = server.latest.without(client_id)
        uploads = ((each, latest[each]) for each in latest.clients())
        rest = self.aggregate(Server(), uploads)
        # A leaving that was cut short is done again: who is out of the total is out of the size.
        gone = server.clients - rest.clients
        size = max(server.size, server.clients) - gone if server.size else 0
        return replace(rest, size=size, latest=latest)

    def rest_of_world(self, client: Client, message: Message) -> Tree:
        """(total - own) / (weight - own weight), or, where there are no others, a zero adapter.

        "No others" is round 0, or a federation of one. With `train_row` it then begins with a draw
        of its own: with the individual adapter's A it would learn what that learns.
        """
        total = select(message.tree, INDIVIDUAL)
        weight = float(message.facts["weight"])
        counted = self.row == "rest_of_world" and bool(message.facts["included"])
        others = weight - client.weight if counted else weight
        if not total or others <= 0:
            if client.second:
                return client.second
            absent = {
                name: tensor if name.factor == "A" else torch.zeros_like(tensor)
                for name, tensor in client.individual.items()
            }
            return move(absent, INDIVIDUAL, REST_OF_WORLD)
        own = client.weight if counted else 0.0
        row = in_blocks(
            lambda t, a: t.sub(a.double(), alpha=own).mul_(1 / others), total, client.individual
        )
        return move(row, INDIVIDUAL, REST_OF_WORLD)

    def _mixer(self, client: Client, message: Message) -> Tree:
        mixers = select(message.tree, MIXER)
        if not (self.share_mixer and mixers):
            return client.mixer
        return cast(scale(mixers, 1 / float(message.facts["weight"])), torch.float32)

    def _plan(self, message: Message) -> Plan:
        slots = (self.lora.slot(INDIVIDUAL), self.lora.slot(REST_OF_WORLD))
        clients = int(message.facts["clients"])
        combine: Mixer | Sum
        match self.gate:
            case "mixer":
                combine = Mixer()
            case "half":
                combine = Sum((0.5, 0.5))
            case "one_over_clients":
                combine = Sum((1 / clients, 1 - 1 / clients))
        return Plan(slots, combine, self.lora.dropout)


def _count(total: Tree, upload: Message, times: int) -> None:
    accumulate(total, upload.tree, times * float(upload.facts["weight"]))
