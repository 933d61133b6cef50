"""FedTreeLoRA: clients in one tree, which each layer of the model cuts at a height of its own.

Bian, Wang, Zhang, Xu: "FedTreeLoRA: Reconciling Statistical and Functional Heterogeneity in
Federated LoRA Fine-Tuning", arXiv 2603.13282. A reconstruction from readers' notes. After a warm-up
in which all clients train alone, with B_i^l that of client i in layer l:

    tree     average linkage on  D(i, j) = mean_l D^l(i, j),  D^l(i, j) = |B_i^l - B_j^l|_F
    layer l  cut into c_l groups, the best silhouette in D^l of  c_{l-1} <= c < min(N, c_{l-1} + K)
             one group counts as a silhouette of tau, and c_0 = 1

From then on client k of group S in layer l trains the mean of S and a number lam of its own against
the frozen mean of all other clients (with one group in a layer: the mean of all, lam = 1):

    y = W0 x + lam s B_S A_S x + (1 - lam) s B_E A_E x       A_S = mean_{i in S} A_i,  B_S likewise
                                                             A_E = mean_{i not in S} A_i, ...

lam is the sigmoid of `lam_rate` times a trained number, since AdamW moves any number by about the
learning rate a step, too little for a logit; its gradient is without that factor. K, tau, the
rounds of the warm-up, c_0, the linkage and lam's rate are not in the notes, and our choice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Name, Tree, merge, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Deploy, Ledger, Local, MemoryLedger, Message, Serving
from fedalt.methods.defaults import at_once
from fedalt.methods.layer_cuts import Groups, grown, layers_of
from fedalt.methods.layer_means import EXPERT, LAM, means_by_layer, means_for, mixed, slots_of
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.training.orders import Fit, Fitted


@dataclass(frozen=True)
class Server:
    """Each client's group in every layer, and the means of groups and of all others.

    `first` holds every client's upload of the warm-up, by which it was grouped, `latest` its last.
    """

    TAG: ClassVar = "fedtree-lora/server"

    round: int = 0
    groups: Groups = field(default_factory=dict)
    experts: Tree = field(default_factory=dict)
    first: Ledger = field(default_factory=MemoryLedger)
    latest: Ledger = field(default_factory=MemoryLedger)


@dataclass(frozen=True)
class Client:
    """The pair of the warm-up, the logit of lam in each layer, and a classifier's head."""

    TAG: ClassVar = "fedtree-lora/client"

    individual: Tree
    lam: Tree
    head: Tree


@dataclass(frozen=True, kw_only=True)
class FedTreeLoRA:
    """The method; who sits out a round is in the means with its latest upload.

    `width` >= 1 is K, `one_group` in [-1, 1] tau, `lam_rate` > 0 how much faster than all other
    trained numbers lam's logit moves. A client that has missed the warm-up's end trains
    one round alone and joins the groups of the client whose warm-up is nearest to that.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    warm_up: int = 2
    width: int = 2
    one_group: float = 0.1
    lam_rate: float = 300.0

    server_state = Server
    client_state = Client
    averages = False
    mingled = True  # who is in a client's group goes on from means that it is in

    def __post_init__(self) -> None:
        check(self, warm_up="[1, inf)", width="[1, inf)", one_group="[-1, 1]", lam_rate="(0, inf)")

    def init_server(self, init: Initializer) -> Server:
        return Server()

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """Everyone draws the same first A; B is zero, and lam one half."""
        lam = {Name(layer, LAM, "weight"): torch.zeros(1) for layer in layers_of(init.sites)}
        return Client(init.adapter(self.lora.slot(EXPERT)), lam, init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """In every layer the mean of the client's group and that of the others."""
        known = client_id in server.latest
        tree = means_for(client_id, server.experts, server.groups) if known else {}
        return Message(tree, {"round": server.round})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the group's mean and lam or, without a group, the client's own pair."""
        tree = merge(message.tree or client.individual, client.lam, client.head)
        trained = names_of(tree, EXPERT, LAM, HEAD)
        fitted: Fitted = yield Fit(
            self.lora.plan(*slots_of(tree)), tree, trained, compose=self._mixed
        )
        adapter, lam, head = (select(fitted.tree, slot) for slot in (EXPERT, LAM, HEAD))
        after = Client(client.individual if message.tree else adapter, lam, head)
        if int(message.facts["round"]) < self.warm_up - 1:
            return after, Message({})
        return after, Message(adapter, {"weight": weight_of(fitted, self.weighting)})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Find a group for who has none, and average within and outside of every group."""
        first, latest = server.first, server.latest
        for client_id, upload in replies:
            if upload.tree:
                first = first if client_id in first else first.put(client_id, upload)
                latest = latest.put(client_id, upload)
        groups = grown(server.groups, first, self.width, self.one_group)
        return Server(server.round + 1, groups, means_by_layer(latest, groups), first, latest)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The newest means with the lam that was trained against those before."""
        tree = merge(message.tree or client.individual, client.lam, client.head)
        return at_once(Serving(self.lora.plan(*slots_of(tree)), self._mixed(tree)))

    def shared(self, client: Client, message: Message) -> Serving | None:
        """The mean of the client's group alone."""
        tree = merge(select(message.tree, EXPERT), client.head)
        return Serving(self.lora.plan(EXPERT), tree) if message.tree else None

    def without(self, server: Server, client_id: str) -> Server:
        """All means once more, without this client's upload; the groups stay as they were found."""
        first, latest = server.first.without(client_id), server.latest.without(client_id)
        means = means_by_layer(latest, server.groups)
        return Server(server.round, server.groups, means, first, latest)

    def _mixed(self, tree: Tree) -> Tree:
        return mixed(tree, self.lam_rate)
