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
from typing import ClassVar, Literal

import torch

from fedalt.adapters.plan import HEAD, names_of
from fedalt.adapters.start import Start
from fedalt.core.tree import Tree, add, cast, merge, move, scale, select, subtract, zeros_like
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Fit, Fitted, Found, Moments, Search

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
    outer: Literal["nesterov", "heavy_ball"] = "nesterov"
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
        for name in ("sync_every", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but it is at least 1")
        if not self.outer_lr > 0:
            raise ValueError(f"outer_lr={self.outer_lr}, but it must be above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}, but it is at least 0 and below 1")
        if self.l1 < 0:
            raise ValueError(f"l1={self.l1}, but it cannot be negative")
        if not self.bound >= max(MIDDLE):
            raise ValueError(f"bound={self.bound}, but the search begins at {max(MIDDLE)}")
        if not 0 < self.spare < 1:
            raise ValueError(f"spare={self.spare}, but it lies between 0 and 1")

    def init_server(self, start: Start) -> Server:
        """No adapter: round 0 will make the first."""
        return Server()

    def init_client(self, start: Start, client_id: str) -> Client:
        """The same first A for everyone, B zero."""
        return Client(start.adapter(self.lora.slot(INDIVIDUAL)), start.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The global adapter, the same for every client."""
        return Message(server.adapter, {"round": server.rounds})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Stage 1 in a client's first round and as long as there is no seed, else stage 2."""
        first = not (client.started and message.tree)
        slot = INDIVIDUAL if first else SHARED
        tree = merge(client.individual if first else message.tree, client.head)
        moments = client.moments if self.carry_inner and not first else None
        fitted: Fitted = yield Fit(
            self.lora.plan(slot),
            tree,
            names_of(tree, slot, HEAD),
            spare=self.spare,
            moments=moments,
        )
        adapter, head = select(fitted.tree, slot), select(fitted.tree, HEAD)
        facts = {"weight": weight_of(fitted, self.weighting)}
        if first:
            # Once there is a global adapter, an untouched one has no place in its next mean.
            upload = Message({}) if message.tree else Message(adapter, facts)
            return Client(adapter, head, started=True), upload
        after = replace(client, head=head, moments=fitted.moments)
        if int(message.facts["round"]) % self.sync_every == 0:
            after = replace(after, individual=move(adapter, SHARED, INDIVIDUAL))
        return after, Message(adapter, facts)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The seed, or a step of the outer optimiser, in float64."""
        mean = weighted_mean(reply for reply in replies if reply[1].tree)
        rounds = server.rounds + 1
        if not mean:
            return replace(server, rounds=rounds)
        if not server.adapter:
            return Server(move(mean, INDIVIDUAL, SHARED), rounds=rounds)
        before = cast(server.adapter, torch.float64)
        step = subtract(before, cast(mean, torch.float64))
        v = cast(server.momentum or zeros_like(before), torch.float64)
        v = add(scale(v, self.momentum), step)
        step = add(step, scale(v, self.momentum)) if self.outer == "nesterov" else v
        after = subtract(before, scale(step, self.outer_lr))
        return Server(cast(after, torch.float32), cast(v, torch.float32), rounds)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """Both adapters fused, as the client's spared examples like them best."""
        if not (client.started and message.tree):
            return self.shared(client, message)
        own, common = move(client.individual, INDIVIDUAL, FUSED), move(message.tree, SHARED, FUSED)

        def fused(weights: Sequence[float]) -> Tree:
            w1, w2 = weights
            return merge(add(scale(own, w1), scale(common, w2)), client.head)

        found: Found = yield Search(
            plan=self.lora.plan(FUSED),
            tree_of=fused,
            penalty=lambda weights: self.l1 * sum(abs(weight) for weight in weights),
            start=MIDDLE,
            bound=self.bound,
            evaluations=self.evaluations,
            spare=self.spare,
        )
        return Serving(self.lora.plan(FUSED), fused(found.numbers))

    def shared(self, client: Client, message: Message) -> Serving:
        """The global adapter alone; before there is one, what everybody draws."""
        adapter = message.tree or move(client.individual, INDIVIDUAL, SHARED)
        return Serving(self.lora.plan(SHARED), merge(adapter, client.head))
