"""HiLoRA: adapters of everyone, of a cluster and of a client, trained one after the other.

Peng, Zou, Zeng, Li, Chen, Li, Wang: "HiLoRA: Hierarchical Low-Rank Adaptation for Personalized
Federated Learning", arXiv 2603.02785. A reconstruction from readers' notes, and for language models
(the paper is about vision). For client k of cluster c, each stage with what came before it frozen:

    y = W0 x + s B_r A_r x  [+ s B_c A_c x  [+ s B_k A_k x]]

    root      all clients train A_r, B_r                                       `root_rounds`
    cluster   descend on  loss + g |B_r^T B_c|^2                               `cluster_rounds`
    leaf      descend on  loss + g |B_r^T B_k|^2 + g |B_c^T B_k|^2, alone      all further rounds

    server    sum_k p_k B_k A_k = U S V^T, cut to rank r:   B <- U,  A <- S V^T;  of a cluster alike

After the root stage clusters are found in each client's B_r, of length 1 and smoothed over rounds:
d(i, j) = 1 - |U_i^T U_j|_F^2 / r, a Gaussian kernel, spectral clusters, their number by the
eigengap. A client that comes later trains the root for a round and sends that, only to be put into
the nearest cluster.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, merge, move, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import at_once, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.product_means import ProductTotals, as_adapter
from fedalt.methods.subspaces import grouped, overlap, remember
from fedalt.training.orders import Fit, Fitted

STAGES = ROOT, CLUSTER, LEAF = "root", "cluster", "leaf"


@dataclass(frozen=True)
class Server:
    """The root, the draw that clusters begin as, and clusters in slots cluster_0 and so on.

    `groups` is each client's cluster, `bases` its B of the root by which it was found.
    """

    TAG: ClassVar = "hilora/server"

    adapters: Tree
    rounds: int = 0
    groups: Mapping[str, int] = field(default_factory=dict)
    bases: Mapping[str, Tree] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """The leaf, and a classifier's head."""

    TAG: ClassVar = "hilora/client"

    leaf: Tree
    head: Tree


@dataclass(frozen=True, kw_only=True)
class HiLoRA:
    """The method; clients that sit out a round do not count in its means.

    `max_clusters` limits the eigengap, `orthogonality` >= 0 is g, `memory` in [0, 1) is how much of
    a client's B is that of the rounds before. g is what readers give, all else is our choice: in
    the paper, a stage ends when it has converged.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    root_rounds: int = 3
    cluster_rounds: int = 3
    max_clusters: int = 8
    orthogonality: float = 0.1
    memory: float = 0.5

    server_state = Server
    client_state = Client
    averages = False
    renewed = True  # rows of root and clusters are directions by strength, others in every round
    without = kept_in_averages

    def __post_init__(self) -> None:
        check(self, root_rounds="[1, inf)", cluster_rounds="[0, inf)", max_clusters="[1, inf)")
        check(self, orthogonality="[0, inf)", memory="[0, 1)")

    def init_server(self, init: Initializer) -> Server:
        root = init.adapter(self.lora.slot(ROOT))
        return Server(merge(root, init.adapter(self.lora.slot(CLUSTER), apart=True)))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """A leaf drawn apart from root and clusters, the same for everyone; its B is zero."""
        return Client(init.adapter(self.lora.slot(LEAF), apart=True), init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The root and, once the client has one, its cluster."""
        own = server.groups.get(client_id, -1)
        cluster = move(server.adapters, slot_of(own), CLUSTER) if own >= 0 else {}
        tree = merge(select(server.adapters, ROOT), cluster)
        return Message(tree, {"stage": self._stage(server.rounds), "own": own})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the adapter of the stage against those before it; a leaf is not sent back."""
        *frozen, slot = slots_of(message)
        before = self._serving(client, message.tree, [*frozen, slot])
        penalty = partial(overlap, slot, frozen, self.orthogonality) if frozen else None
        trained = names_of(before.tree, slot, HEAD)
        fitted: Fitted = yield Fit(before.plan, before.tree, trained, penalty=penalty)
        after = Client(select(fitted.tree, LEAF) or client.leaf, select(fitted.tree, HEAD))
        upload = Message(select(fitted.tree, slot), {"weight": weight_of(fitted, self.weighting)})
        return after, Message({}) if slot == LEAF else upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Means of products, of the root or of clusters; then everybody is put into a cluster."""
        totals, bases, stage = ProductTotals(), dict(server.bases), self._stage(server.rounds)
        for client_id, upload in replies:
            remember(bases, client_id, select(upload.tree, ROOT), self.memory)
            if upload.tree and (client_id in server.groups or not stage):
                totals.add(server.groups.get(client_id, -1), upload)
        adapters, groups = dict(server.adapters), server.groups
        for group, products in totals.means():
            adapters |= as_adapter(products, select(adapters, slot_of(group)))
        if self._stage(server.rounds + 1):
            groups = grouped(bases, groups, self.max_clusters)
            for slot in {slot_of(group) for group in groups.values()}:
                adapters = {**move(adapters, CLUSTER, slot), **adapters}
        return Server(adapters, server.rounds + 1, groups, bases)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """All adapters up to the stage's."""
        return at_once(self._serving(client, message.tree, slots_of(message)))

    def shared(self, client: Client, message: Message) -> Serving:
        """Root and cluster, without the leaf."""
        return self._serving(client, message.tree, slots_of(message)[:2])

    def _stage(self, round_: int) -> int:
        return (round_ >= self.root_rounds) + (round_ >= self.root_rounds + self.cluster_rounds)

    def _serving(self, client: Client, tree: Tree, slots: Sequence[str]) -> Serving:
        leaf = client.leaf if LEAF in slots else {}
        return Serving(self.lora.plan(*slots), merge(tree, leaf, client.head))


def slots_of(message: Message) -> Sequence[str]:
    """The adapters that a client has after this broadcast, the last of which it trains."""
    return STAGES[: 1 + int(message.facts["stage"])] if int(message.facts["own"]) >= 0 else (ROOT,)


def slot_of(group: int) -> str:
    """The slot in which the server keeps a cluster's adapter, or the root."""
    return ROOT if group < 0 else f"cluster_{group}"
