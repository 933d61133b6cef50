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
from typing import ClassVar

from fedalt.adapters.plan import HEAD, ROUTER, Layout, Router, names_of
from fedalt.adapters.start import Start
from fedalt.core.tree import Tree, merge, move, select
from fedalt.methods.checks import check
from fedalt.methods.clustering import Signal, cluster, distances, has_direction, nearest_group
from fedalt.methods.contract import Deploy, Ledger, Local, MemoryLedger, Message, Serving
from fedalt.methods.defaults import at_once, kept_in_averages
from fedalt.methods.experts import draw_router, expert, first_rows, routed, router_of
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import Totals
from fedalt.training.orders import Fit, Fitted

INDIVIDUAL = "individual"


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
        check(self, warm_up="[1, inf)", max_experts="[1, inf)", min_silhouette="[-1, 1]")

    def init_server(self, start: Start) -> Server:
        """A router of as many rows as can be needed, if routers are shared at all."""
        return Server(routers=draw_router(start, self.max_experts) if self.share_router else {})

    def init_client(self, start: Start, client_id: str) -> Client:
        """Everyone draws the same first A, without which no two B could be compared; B is zero."""
        router = {} if self.share_router else draw_router(start, self.max_experts)
        return Client(start.adapter(self.lora.slot(INDIVIDUAL)), router, start.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """All experts and the group's router; only facts to a client without a group."""
        own = server.clusters.get(client_id, -1)
        facts = {"round": server.round, "own": own, "experts": len(set(server.clusters.values()))}
        tree = merge(server.experts, move(server.routers, router_of(own), ROUTER))
        return Message(tree if own >= 0 else {}, facts)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the group's expert and the router or, without a group, the client's own pair."""
        own, serving = int(message.facts["own"]), self._serving(client, message)
        slot = INDIVIDUAL if own < 0 else expert(own)
        trained = names_of(serving.tree, slot, ROUTER, HEAD)
        fitted: Fitted = yield Fit(serving.plan, serving.tree, trained)
        adapter, router = select(fitted.tree, slot), select(fitted.tree, ROUTER)
        after = replace(client, head=select(fitted.tree, HEAD))
        facts = {"weight": weight_of(fitted, self.weighting)}
        if own < 0:
            over = int(message.facts["round"]) >= self.warm_up - 1
            return replace(after, individual=adapter), Message(adapter, facts) if over else Message(
                {}
            )
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
        clusters, latest, totals = dict(server.clusters), server.latest, Totals()
        for client_id, upload in replies:
            if client_id in server.clusters:
                totals.add(server.clusters[client_id], upload)
            elif has_direction(upload.tree, self.signal):
                clusters[client_id] = nearest_group(
                    upload.tree, server.latest, server.clusters, self.signal
                )
                latest = latest.put(client_id, upload)
        experts, routers = dict(server.experts), dict(server.routers)
        for own, mean in totals.means():
            experts |= select(mean, expert(own))
            routers |= move(mean, ROUTER, router_of(own))
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
        tree = merge(select(message.tree, expert(own)), client.head)
        return Serving(self.lora.plan(expert(own)), tree)

    def _group(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The end of the warm-up, once there are uploads: groups, and an expert of each."""
        server = replace(server, round=server.round + 1)
        uploads = {k: u for k, u in replies if u.tree and has_direction(u.tree, self.signal)}
        if not uploads:
            return server
        far = distances({client_id: uploads[client_id].tree for client_id in uploads}, self.signal)
        labels = cluster(far, self.max_experts, self.min_silhouette).labels
        clusters, latest = dict(zip(uploads, labels, strict=True)), server.latest
        totals = Totals()
        for client_id, upload in uploads.items():
            totals.add(clusters[client_id], upload)
            latest = latest.put(client_id, upload)
        means, router = totals.means(), first_rows(server.routers, max(labels) + 1)
        experts = merge(*(move(mean, INDIVIDUAL, expert(own)) for own, mean in means))
        routers = merge(*(move(router, ROUTER, router_of(own)) for own, _ in means))
        return Server(server.round, routers, experts, clusters, latest)

    def _serving(self, client: Client, message: Message) -> Serving:
        """The client's own pair, or all experts and a router, which one expert does without."""
        own, experts = int(message.facts["own"]), int(message.facts["experts"])
        if own < 0:
            return Serving(self.lora.plan(INDIVIDUAL), merge(client.individual, client.head))
        plan = routed(self.lora, experts, Router(own, self.layout, self.renormalise))
        router = {} if self.share_router else first_rows(client.router, experts)
        return Serving(plan, merge(message.tree, router, client.head))
