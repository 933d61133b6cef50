"""FedLEASE: clients in groups found after a warm-up, one expert per group, a router over experts.

Wang, Bian, Zhang, Xu: "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning",
arXiv 2509.15087. First every client trains a pair of its own and uploads it once. Then, over all
sites l, the server groups the clients, M groups in all, and makes one expert of each group C_e:

    d(i, j) = mean_l (1 - cos(B_i^l, B_j^l))         M, C_e: average linkage, best silhouette
    A_e = mean_{i in C_e} A_i,  B_e likewise

From then on a client of group c trains A_c, B_c and a router G of 2M - 1 rows on every site, the
other experts frozen; the server averages what a group's members upload. With x the site's input
and e(t) the expert of row t, which for M of the rows is c and for each other expert is one row:

    p = softmax(G x)     T = the M largest of p     w_t = p_t / sum_{u in T} p_u
    y = W0 x + s sum_{t in T} w_t B_e(t) A_e(t) x

M rows of 2M - 1 are the client's own, so its own expert is always among the chosen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import ClassVar

import torch

from fedalt.adapters.plan import HEAD, MIXER, ROUTER, Layout, Plan, Router, names_of, single
from fedalt.adapters.start import Start
from fedalt.core.tree import Tree, accumulate, apply, cast, merge, move, scale, select
from fedalt.methods.clustering import Signal, cluster, distances, has_direction
from fedalt.methods.contract import (
    Deploy,
    Ledger,
    Local,
    MemoryLedger,
    Message,
    Serving,
)
from fedalt.methods.defaults import at_once, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.training.orders import Fit, Fitted

INDIVIDUAL = "individual"
NOBODY = Message({}, {"weight": 0.0})


@dataclass(frozen=True)
class Server:
    """`clusters` is the group of each client, and empty as long as the warm-up lasts.

    `experts` lie in slots expert_0 and so on; shared `routers` in router_0 and so on, before there
    are groups one of them all in slot router; `latest` holds every client's warm-up upload.
    """

    TAG: ClassVar = "fedlease/server"

    round: int = 0
    routers: Tree = field(default_factory=dict)
    experts: Tree = field(default_factory=dict)
    clusters: Mapping[str, int] = field(default_factory=dict)
    latest: Ledger = field(default_factory=MemoryLedger)


@dataclass(frozen=True)
class Client:
    """The pair of the warm-up, which rests once the client has a group; a private router; the head.

    A private router has rows for `max_experts` until the client has trained it.
    """

    TAG: ClassVar = "fedlease/client"

    individual: Tree
    router: Tree
    head: Tree


@dataclass(frozen=True, kw_only=True)
class FedLEASE:
    """The method; a client that has missed the warm-up's end trains one round alone to be grouped.

    `warm_up`: rounds before the groups are found; at most `max_experts` of them, compared by
    `signal`, and one alone if the best silhouette is below `min_silhouette`. `layout` is the order
    of the router's rows, `renormalise` lets a token's weights sum to 1. `share_router`: average
    the routers within a group, or keep each with its client. `weighting` counts in all means.

    Defaults are those of the authors' code, but for the layout and `max_experts` (4 there), which
    are the paper's, and `warm_up` (5 of 25 rounds there), which suits shorter runs. What becomes of
    clients that come late, of fewer than three, and of a low silhouette is our choice.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    warm_up: int = 2
    max_experts: int = 8
    signal: Signal = "B"
    min_silhouette: float | None = None
    layout: Layout = "paper"
    renormalise: bool = True
    share_router: bool = True

    server_state = Server
    client_state = Client
    averages = False
    without = kept_in_averages

    def __post_init__(self) -> None:
        for name in ("warm_up", "max_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but it is at least 1")
        if self.min_silhouette is not None and not -1 <= self.min_silhouette <= 1:
            raise ValueError(f"min_silhouette={self.min_silhouette}, but it lies between -1 and 1")

    def init_server(self, start: Start) -> Server:
        """A router of as many rows as can be needed, if routers are shared at all."""
        return Server(routers=self._drawn(start) if self.share_router else {})

    def init_client(self, start: Start, client_id: str) -> Client:
        """Everyone draws the same first A, without which no two B could be compared; B is zero."""
        router = {} if self.share_router else self._drawn(start)
        return Client(start.adapter(self.lora.slot(INDIVIDUAL)), router, start.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """All experts and the group's router; only facts to a client without a group."""
        own = server.clusters.get(client_id, -1)
        experts = len(set(server.clusters.values()))
        facts = {"round": server.round, "own": own, "experts": experts}
        if own < 0:
            return Message({}, facts)
        return Message(merge(server.experts, move(server.routers, _router(own), ROUTER)), facts)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the group's expert and the router or, without a group, the client's own pair."""
        own, round_ = int(message.facts["own"]), int(message.facts["round"])
        serving = self._serving(client, message)
        slot = INDIVIDUAL if own < 0 else _expert(own)
        trained = names_of(serving.tree, slot, ROUTER, HEAD)
        fitted: Fitted = yield Fit(serving.plan, serving.tree, trained)
        adapter, router = select(fitted.tree, slot), select(fitted.tree, ROUTER)
        after = replace(client, head=select(fitted.tree, HEAD))
        facts = {"weight": weight_of(fitted, self.weighting)}
        if own < 0:
            over = round_ >= self.warm_up - 1
            upload = Message(adapter, facts) if over else Message({})
            return replace(after, individual=adapter), upload
        if self.share_router:
            return after, Message(merge(adapter, router), facts)
        return replace(after, router=router), Message(adapter, facts)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The mean of each group's uploads; a group of which nobody takes part keeps what it has.

        Who has no group sends the pair of a warm-up and is put into the nearest one; a pair that is
        zero on a site is nearest to none, and its client tries again.
        """
        if not server.clusters:
            return self._group(server, replies)
        sums: dict[int, Message] = {}
        clusters, latest = dict(server.clusters), server.latest
        for client_id, upload in replies:
            if client_id in server.clusters:
                own = server.clusters[client_id]
                sums[own] = _sum(sums.get(own, NOBODY), upload)
            elif has_direction(upload.tree, self.signal):
                clusters[client_id] = self._nearest(server, client_id, upload)
                latest = latest.put(client_id, upload)
        experts, routers = dict(server.experts), dict(server.routers)
        for own, total in sums.items():
            mean = _mean(total)
            experts |= select(mean, _expert(own))
            routers |= move(mean, ROUTER, _router(own))
        return Server(server.round + 1, routers, experts, clusters, latest)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The routed experts or, without a group, the client's own pair."""
        return at_once(self._serving(client, message))

    def shared(self, client: Client, message: Message) -> Serving | None:
        """What everyone in the group has: with private routers the expert without the others."""
        own = int(message.facts["own"])
        if own < 0:
            return None
        if self.share_router:
            return self._serving(client, message)
        slot = self.lora.slot(_expert(own))
        tree = merge(select(message.tree, slot.name), client.head)
        return Serving(single(slot, self.lora.dropout), tree)

    def _group(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The end of the warm-up, once there are uploads: groups, and an expert of each."""
        uploads = {
            client_id: upload
            for client_id, upload in replies
            if upload.tree and has_direction(upload.tree, self.signal)
        }
        after = replace(server, round=server.round + 1)
        if not uploads:
            return after
        far = distances({each: uploads[each].tree for each in uploads}, self.signal)
        found = cluster(far, self.max_experts, self.min_silhouette)
        clusters = dict(zip(uploads, found.labels, strict=True))
        sums = dict.fromkeys(range(found.clusters), NOBODY)
        latest = server.latest
        for client_id, upload in uploads.items():
            sums[clusters[client_id]] = _sum(sums[clusters[client_id]], upload)
            latest = latest.put(client_id, upload)
        means = {own: _mean(total) for own, total in sums.items()}
        experts = merge(*(move(mean, INDIVIDUAL, _expert(own)) for own, mean in means.items()))
        router = _first_rows(server.routers, found.clusters)
        routers = merge(*(move(router, ROUTER, _router(own)) for own in means))
        return replace(after, routers=routers, experts=experts, clusters=clusters, latest=latest)

    def _nearest(self, server: Server, client_id: str, upload: Message) -> int:
        """The group whose members' pairs of the warm-up are nearest in the mean."""
        far: dict[int, list[float]] = {}
        for member in server.latest.clients():
            pair = {client_id: upload.tree, member: server.latest[member].tree}
            distance = float(distances(pair, self.signal)[0, 1])
            far.setdefault(server.clusters[member], []).append(distance)
        return min(far, key=lambda own: (fmean(far[own]), own))

    def _serving(self, client: Client, message: Message) -> Serving:
        """The client's own pair, or all experts and a router, which one expert does without."""
        own, experts = int(message.facts["own"]), int(message.facts["experts"])
        if own < 0:
            plan = single(self.lora.slot(INDIVIDUAL), self.lora.dropout)
            return Serving(plan, merge(client.individual, client.head))
        slots = tuple(self.lora.slot(_expert(number)) for number in range(experts))
        plan = single(slots[0], self.lora.dropout)
        if experts > 1:
            plan = Plan(slots, Router(own, self.layout, self.renormalise), self.lora.dropout)
        router = {} if self.share_router else _first_rows(client.router, experts)
        return Serving(plan, merge(message.tree, router, client.head))

    def _drawn(self, start: Start) -> Tree:
        return move(start.mixer(2 * self.max_experts - 1), MIXER, ROUTER)


def _expert(number: int) -> str:
    return f"expert_{number}"


def _router(number: int) -> str:
    return f"router_{number}"


def _first_rows(router: Tree, experts: int) -> Tree:
    """The rows that a router over so many experts has; one over a single expert is left out."""
    return apply(lambda g: g[: 2 * experts - 1], router) if experts > 1 else {}


def _sum(total: Message, upload: Message) -> Message:
    """A weighed sum and its weight; in float64, so that many clients cost no precision."""
    weight = float(upload.facts["weight"])
    tree = accumulate(total.tree or {}, upload.tree, weight)  # an empty one is everybody's
    return Message(tree, {"weight": float(total.facts["weight"]) + weight})


def _mean(total: Message) -> Tree:
    return cast(scale(total.tree, 1 / float(total.facts["weight"])), torch.float32)
