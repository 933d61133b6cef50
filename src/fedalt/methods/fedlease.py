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
from dataclasses import dataclass, field
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, ROUTER, Layout, Router, names_of
from fedalt.core.tree import Tree, merge, move, select
from fedalt.methods.checks import check
from fedalt.methods.clustering import Signal
from fedalt.methods.contract import Deploy, Ledger, Local, MemoryLedger, Message, Serving
from fedalt.methods.defaults import at_once, kept_in_averages
from fedalt.methods.experts import draw_router, expert, first_rows, regrouped, routed, router_of
from fedalt.methods.grouping import Grouping
from fedalt.methods.lora import Lora, Weighting, weight_of
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

    def init_server(self, init: Initializer) -> Server:
        """A router of as many rows as can be needed, if routers are shared at all."""
        return Server(routers=draw_router(init, self.max_experts) if self.share_router else {})

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """Everyone draws the same first A, without which no two B could be compared; B is zero."""
        router = {} if self.share_router else draw_router(init, self.max_experts)
        return Client(init.adapter(self.lora.slot(INDIVIDUAL)), router, init.head())

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
        adapter, router, head = (select(fitted.tree, part) for part in (slot, ROUTER, HEAD))
        kept = client.router if own < 0 or self.share_router else router
        after = Client(adapter if own < 0 else client.individual, kept, head)
        if own < 0 and int(message.facts["round"]) < self.warm_up - 1:
            return after, Message({})
        upload = merge(adapter, router) if self.share_router else adapter
        return after, Message(upload, {"weight": weight_of(fitted, self.weighting)})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The mean of each group's uploads; a group of which nobody takes part keeps what it has.

        Who has no group sends the pair of a warm-up and is put into the nearest one; a pair that is
        zero on a site is nearest to none, and its client tries again.
        """
        grouping = Grouping(self.signal, self.max_experts, self.min_silhouette)
        totals, newcomers = grouping.sort(replies, server.clusters)
        clusters = grouping.assign(newcomers, server.clusters, server.latest)
        experts, routers = regrouped(server.experts, server.routers, totals, newcomers, clusters)
        latest = server.latest
        for client_id, upload in newcomers.items():
            latest = latest.put(client_id, upload)
        return Server(server.round + 1, routers, experts, clusters, latest)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The routed experts or, without a group, the client's own pair."""
        return at_once(self._serving(client, message))

    def shared(self, client: Client, message: Message) -> Serving | None:
        """What everyone in the group has: with private routers the expert without the others."""
        slot = expert(int(message.facts["own"]))
        if slot == expert(-1) or self.share_router:
            return None if slot == expert(-1) else self._serving(client, message)
        return Serving(self.lora.plan(slot), merge(select(message.tree, slot), client.head))

    def _serving(self, client: Client, message: Message) -> Serving:
        """The client's own pair, or all experts and a router, which one expert does without."""
        own, experts = int(message.facts["own"]), int(message.facts["experts"])
        if own < 0:
            return Serving(self.lora.plan(INDIVIDUAL), merge(client.individual, client.head))
        plan = routed(self.lora, experts, Router(own, self.layout, self.renormalise))
        return Serving(plan, merge(message.tree, first_rows(client.router, experts), client.head))
