"""FedALT's ablations: the choices of the paper, each with what it is compared to.

The section on ablations of Bian, Wang, Zhang, Xu: "FedALT", arXiv 2503.11880. `--method fedalt`
with one of these settings is this class; with all of them at their defaults it is FedALT, number
for number. The server's half is FedALT's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fedalt.adapters.initializer import Initializer, MixerInit
from fedalt.adapters.plan import HEAD, MIXER, Mixer, Plan, Sum, names_of
from fedalt.core.tree import Tree, cast, merge, move, scale, select
from fedalt.methods.checks import only_with
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import at_once
from fedalt.methods.fedalt import INDIVIDUAL, REST_OF_WORLD, FedALT, Server, rest_of_world
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.training.orders import Fit, Fitted


@dataclass(frozen=True)
class Client:
    """What a client of FedALT keeps, and where a rest of world that is trained begins.

    `second` stands for the rest of world as long as there are no others.
    """

    TAG: ClassVar = "fedalt-ablations/client"

    individual: Tree
    mixer: Tree
    head: Tree
    weight: float = 0.0
    second: Tree = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FedALTAblations:
    """FedALT with some of its choices changed.

    `row`: the frozen adapter is the mean of the others, or of everybody ("global_mean").
    `train_row`: train both adapters; the trained rest of world is forgotten after the round.
    `gate`: the mixer, or fixed weights: one half, or 1/K for the individual adapter, K being the
    clients that the federation began with or, if they are more, all that have uploaded.
    `share_mixer`: average the mixers over the clients instead of keeping them private.
    `shared_start`: all clients draw the same first A; the authors' code draws one for each.
    `freeze_a`: the individual A stays as drawn, the same for everyone; B alone trains and is sent
    (as FFA-LoRA has it, arXiv 2403.12313). The rest of world is then exactly the mean of B A.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    row: Literal["rest_of_world", "global_mean"] = "rest_of_world"
    train_row: bool = False
    gate: Literal["mixer", "half", "one_over_clients"] = "mixer"
    share_mixer: bool = False
    mixer_init: MixerInit = "kaiming"
    shared_start: bool = True
    freeze_a: bool = False

    server_state = Server
    client_state = Client
    averages = False

    def __post_init__(self) -> None:
        only_with(self, "freeze_a", False, "train_row", "shared_start")
        only_with(self, "gate", "mixer", "share_mixer", "mixer_init")

    def init_server(self, init: Initializer) -> Server:
        return FedALT().init_server(init)

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """A drawn, B zero; a rest of world that is trained begins with a draw of its own.

        With the individual adapter's A it would learn what that learns.
        """
        own, row = self.lora.slot(INDIVIDUAL), self.lora.slot(REST_OF_WORLD)
        return Client(
            individual=init.adapter(own, only_for="" if self.shared_start else client_id),
            mixer=init.mixer(2, self.mixer_init) if self.gate == "mixer" else {},
            head=init.head(),
            second=init.adapter(row, apart=True) if self.train_row else {},
        )

    def broadcast(self, server: Server, client_id: str) -> Message:
        return FedALT().broadcast(server, client_id)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train what the switches say; upload the individual adapter and a shared mixer."""
        serving = self._serving(client, message)
        slots = (INDIVIDUAL, MIXER, HEAD, *((REST_OF_WORLD,) if self.train_row else ()))
        trained = names_of(self._moving(serving.tree), *slots)
        fitted: Fitted = yield Fit(serving.plan, serving.tree, trained)
        individual, mixer, head = (select(fitted.tree, s) for s in (INDIVIDUAL, MIXER, HEAD))
        upload = merge(self._moving(individual), mixer if self.share_mixer else {})
        weight = weight_of(fitted, self.weighting)
        after = Client(individual, mixer, head, weight, client.second)
        return after, Message(upload, {"weight": weight})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """That of FedALT; shared mixers are part of the total."""
        return FedALT().aggregate(server, replies)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """As FedALT: the newest rest of world with the mixer trained against the one before."""
        return at_once(self._serving(client, message))

    def shared(self, client: Client, message: Message) -> Serving:
        tree = merge(self._rest_of_world(client, message), client.head)
        return Serving(self.lora.plan(REST_OF_WORLD), tree)

    def without(self, server: Server, client_id: str) -> Server:
        return FedALT().without(server, client_id)

    def _moving(self, tree: Tree) -> Tree:
        """A tree without what stays as it was drawn."""
        return {n: t for n, t in tree.items() if n.factor != "A" or not self.freeze_a}

    def _rest_of_world(self, client: Client, message: Message) -> Tree:
        included = self.row == "rest_of_world" and bool(message.facts["included"])
        if client.second and float(message.facts["weight"]) <= client.weight * included:
            return client.second
        told = Message(select(message.tree, INDIVIDUAL), dict(message.facts, included=included))
        row = rest_of_world(self._moving(client.individual), client.weight, told)
        # An A that stays as drawn is not sent: the others have this client's.
        return {**move(client.individual, INDIVIDUAL, REST_OF_WORLD), **row}

    def _serving(self, client: Client, message: Message) -> Serving:
        mixer, mixers = client.mixer, select(message.tree, MIXER)
        if self.share_mixer and mixers:
            mixer = cast(scale(mixers, 1 / float(message.facts["weight"])), torch.float32)
        slots = (self.lora.slot(INDIVIDUAL), self.lora.slot(REST_OF_WORLD))
        tree = merge(client.individual, self._rest_of_world(client, message), mixer, client.head)
        return Serving(Plan(slots, self._combine(message), self.lora.dropout), tree)

    def _combine(self, message: Message) -> Mixer | Sum:
        if self.gate == "mixer":
            return Mixer()
        own = 1 / (2 if self.gate == "half" else int(message.facts["clients"]))
        return Sum((own, 1 - own))
