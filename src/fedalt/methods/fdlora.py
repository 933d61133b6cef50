"""FDLoRA: an individual adapter, a global one trained with two optimisers, fused by two numbers.

Qi, Luan, Huang, Fung, Yang, Qian: "FDLoRA: Personalized Federated Learning of Large Language Model
via Dual LoRA Tuning", arXiv 2406.07925. theta stands for all A and B of an adapter:

    stage 1, round 0   theta_k: trained by client k alone;    theta <- sum_k p_k theta_k, the seed
    stage 2, round t   client:  phi_k <- AdamW from theta;    if t mod H = 0: theta_k <- phi_k
                       server:  D = sum_k p_k (theta - phi_k),    v <- mu v + D
                                theta <- theta - eta (D + mu v)                       (Nesterov)
    stage 3, serving   A = w1 A_k + w2 A_theta,  B = w1 B_k + w2 B_theta,  y = W0 x + s B A x
                       (w1, w2): least loss(w) + l1 (|w1| + |w2|) on a few of the client's examples

B A = w1^2 B_k A_k + w2^2 B_theta A_theta + w1 w2 (B_k A_theta + B_theta A_k): to fuse factors is
not to weigh two adapters. The client's AdamW goes on with its moments from round to round.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, add, merge, move, scale, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.methods.outer_descent import Form, OuterDescent
from fedalt.training.orders import Fit, Fitted, Moments, Search

SHARED = "shared"
INDIVIDUAL = "individual"
FUSED = "fused"
MIDDLE = (0.5, 0.5)  # of two equal adapters, this makes exactly either of them


@dataclass(frozen=True)
class Server:
    """theta, empty until it is seeded; the momentum v, empty at zero; how many rounds are done."""

    TAG: ClassVar = "fdlora/server"

    adapter: Tree = field(default_factory=dict)
    momentum: Tree = field(default_factory=dict)
    rounds: int = 0


@dataclass(frozen=True)
class Client:
    """theta_k, whether it has been trained, the moments of stage 2, and a classifier's head."""

    TAG: ClassVar = "fdlora/client"

    individual: Tree
    head: Tree
    started: bool = False
    moments: Moments = field(default_factory=Moments)


@dataclass(frozen=True, kw_only=True)
class FDLoRA:
    """The method; clients that sit out a round do not count in its mean.

    `outer`: the server's form of momentum, `outer_lr` its eta, `momentum` its mu. `sync_every` is
    H: in a run of at most H rounds nothing is ever copied, so the usual one is 1, one of the two
    values that readers of the method give (the other is 5). `carry_inner`: clients keep AdamW's
    moments from round to round. `l1`: what the fusion pays for large weights, which lie within
    +-`bound` and are found with `evaluations` looks at the loss. `spare` in (0, 1): the share of
    the training examples kept from training for that.

    A client whose first round comes later has its stage 1 then, and uploads nothing: the seed is
    sown. `outer_lr`, `momentum`, `sync_every`, `bound`, `evaluations`, `spare` are our choice.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    outer: Form = "nesterov"
    outer_lr: float = 0.7
    momentum: float = 0.9
    sync_every: int = 1
    carry_inner: bool = True
    l1: float = 0.05
    bound: float = 1.5
    evaluations: int = 30
    spare: float = 0.05

    server_state = Server
    client_state = Client
    averages = True
    without = kept_in_averages

    def __post_init__(self) -> None:
        check(self, outer_lr="(0, inf)", momentum="[0, 1)", spare="(0, 1)", l1="[0, inf)")
        # The search begins at MIDDLE, so its bounds lie beyond that.
        check(self, sync_every="[1, inf)", evaluations="[1, inf)", bound="[0.5, inf)")

    def init_server(self, init: Initializer) -> Server:
        """No adapter: round 0 will make the first."""
        return Server()

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """The same first A for everyone, B zero."""
        return Client(init.adapter(self.lora.slot(INDIVIDUAL)), init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The global adapter, the same for every client."""
        return Message(server.adapter, {"round": server.rounds})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Stage 1 in a client's first round and as long as there is no seed, else stage 2."""
        first = not (client.started and message.tree)
        slot = INDIVIDUAL if first else SHARED
        tree = merge(client.individual if first else message.tree, client.head)
        plan, trained = self.lora.plan(slot), names_of(tree, slot, HEAD)
        moments = client.moments if self.carry_inner and not first else None
        fitted: Fitted = yield Fit(plan, tree, trained, spare=self.spare, moments=moments)
        adapter, head = select(fitted.tree, slot), select(fitted.tree, HEAD)
        upload = Message(adapter, {"weight": weight_of(fitted, self.weighting)})
        if first:
            # Once there is a global adapter, an untouched one has no place in its next mean.
            return Client(adapter, head, started=True), Message({}) if message.tree else upload
        copies = int(message.facts["round"]) % self.sync_every == 0
        individual = move(adapter, SHARED, INDIVIDUAL) if copies else client.individual
        return Client(individual, head, True, fitted.moments), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The seed, or a step of the outer optimiser, in float64."""
        mean = weighted_mean(reply for reply in replies if reply[1].tree)
        server = replace(server, rounds=server.rounds + 1)
        if not (mean and server.adapter):
            return replace(server, adapter=server.adapter or move(mean, INDIVIDUAL, SHARED))
        descent = OuterDescent(self.outer_lr, self.momentum, self.outer)
        return Server(*descent.step(server.adapter, mean, server.momentum), server.rounds)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """Both adapters fused, as the client's spared examples like them best."""
        if not (client.started and message.tree):
            return self.shared(client, message)
        own, common = move(client.individual, INDIVIDUAL, FUSED), move(message.tree, SHARED, FUSED)

        def fused(w: Sequence[float]) -> Tree:
            return merge(add(scale(own, w[0]), scale(common, w[1])), client.head)

        plan, limits = self.lora.plan(FUSED), (self.bound, self.evaluations, self.spare)
        found = yield Search(plan, fused, lambda w: self.l1 * sum(map(abs, w)), MIDDLE, *limits)
        return Serving(plan, fused(found.numbers))

    def shared(self, client: Client, message: Message) -> Serving:
        """The global adapter alone; before there is one, what everybody draws."""
        adapter = message.tree or move(client.individual, INDIVIDUAL, SHARED)
        return Serving(self.lora.plan(SHARED), merge(adapter, client.head))
