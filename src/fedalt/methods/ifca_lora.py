"""IFCA with LoRA: several shared adapters, of which each client takes the one that fits it best.

Ghosh, Chung, Yin, Ramchandran: "An Efficient Framework for Clustered Federated Learning",
arXiv 2006.04088 (IFCA), with one low-rank adapter in the place of each of its M models. With f_k
the mean loss on all training examples of client k:

    client   j_k = argmin_j f_k(A_j, B_j);  descend on f_k from A_{j_k}, B_{j_k}
    server   A_j <- sum_{k: j_k = j} p_k A_k,  B_j likewise;  who is chosen by nobody stays

The M models have to differ at first. The paper draws them at random; M drawn adapters with B = 0
are one and the same function, so that every client would choose the first. Here everyone trains one
draw in the first round, and the M adapters begin as the uploads of M clients that lie far apart.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, merge, move, select
from fedalt.methods.checks import check
from fedalt.methods.clustering import distances, has_direction, spread_out
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import kept_in_averages, nothing_shared
from fedalt.methods.experts import expert
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import Totals
from fedalt.training.orders import Fit, Fitted, Found, Order, look_at

CHOSEN = "chosen"


@dataclass(frozen=True)
class Server:
    """The adapters, in slots expert_0 and so on; one drawn one as long as there are no others."""

    TAG: ClassVar = "ifca-lora/server"

    adapters: Tree


@dataclass(frozen=True)
class Client:
    """Only a classifier's head is the client's own; its group is found anew each time."""

    TAG: ClassVar = "ifca-lora/client"

    head: Tree


@dataclass(frozen=True, kw_only=True)
class IFCALoRA:
    """The method; clients that sit out a round do not count in its means.

    `groups` >= 1 is M. With 1 it is FedIT. Of fewer clients there are fewer adapters.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    groups: int = 4

    server_state = Server
    client_state = Client
    averages = False
    renewed = True
    shared = nothing_shared  # which adapter is the client's, only its data tell
    without = kept_in_averages

    def __post_init__(self) -> None:
        check(self, groups="[1, inf)")

    def init_server(self, init: Initializer) -> Server:
        return Server(init.adapter(self.lora.slot(expert(0))))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        return Client(init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """All adapters, the same for every client."""
        return Message(server.adapters)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Choose an adapter, train it, and send it back with its number."""
        group, tree = yield from self._choose(client, message)
        fitted: Fitted = yield Fit(self.lora.plan(CHOSEN), tree, names_of(tree, CHOSEN, HEAD))
        facts = {"weight": weight_of(fitted, self.weighting), "group": group}
        return Client(select(fitted.tree, HEAD)), Message(select(fitted.tree, CHOSEN), facts)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The mean of each group's uploads or, as long as there is one adapter, M first ones."""
        count = experts_of(server.adapters)
        if count == 1 and self.groups > 1:
            return Server(self._first(dict(replies)) or server.adapters)
        totals = Totals()
        for client_id, upload in replies:
            group = int(upload.facts["group"])
            if not 0 <= group < count:
                raise ValueError(f"{client_id!r} chose adapter {group} of {count}")
            totals.add(group, upload)
        means = [move(mean, CHOSEN, expert(group)) for group, mean in totals.means()]
        return Server({**server.adapters, **{n: t for mean in means for n, t in mean.items()}})

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The adapter that fits the client's training examples best, as the server has it now."""
        _, tree = yield from self._choose(client, message)
        return Serving(self.lora.plan(CHOSEN), tree)

    def _choose(self, client: Client, message: Message) -> Generator[Order, Any, tuple[int, Tree]]:
        """The number of the adapter with the lowest loss, the first of equals, and its tree."""
        candidates = [
            merge(move(message.tree, expert(group), CHOSEN), client.head)
            for group in range(experts_of(message.tree))
        ]
        losses: list[float] = []
        for tree in candidates if len(candidates) > 1 else ():
            found: Found = yield look_at(self.lora.plan(CHOSEN), tree)
            losses.append(found.objective)
        group = losses.index(min(losses)) if losses else 0
        return group, candidates[group]

    def _first(self, uploads: dict[str, Message]) -> Tree:
        """The uploads of clients that lie far apart; those that point nowhere cannot be chosen."""
        trees = {k: up.tree for k, up in uploads.items() if has_direction(up.tree, "BA")}
        if not trees:
            return {}
        chosen = spread_out(distances(trees, "BA"), self.groups)
        adapters = list(trees.values())
        return merge(*(move(adapters[at], CHOSEN, expert(i)) for i, at in enumerate(chosen)))


def experts_of(adapters: Tree) -> int:
    """How many adapters a tree holds."""
    return len({name.slot for name in adapters})
