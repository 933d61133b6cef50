"""FedDPA: a shared adapter, an individual one, and a blend by likeness to the client's own prompts.

Yang, Long, Shen, Jiang, Blumenstein: "Dual-Personalizing Adapter for Federated Foundation Models",
arXiv 2403.19211. On every site, with A, B shared and A_k, B_k individual of client k:

    shared phase      descend on A, B:      y = W0 x + s B A x;  A <- sum_k p_k A,  B <- sum_k p_k B
    individual phase  descend on A_k, B_k:  y = W0 x + s [c B_k A_k x + (1-c) B A x],  A, B fixed
    a question q      w = lambda 1/S sum_i cos(e(q), e(x_i))
                      y = W0 x + s [w B_k A_k x + (1-w) B A x]

x_1 .. x_S are prompts of the client; e is the last hidden state at a prompt's last token, with the
individual adapter alone. Schedule "T" has both phases in every round but the first; "F" only the
shared one, and before a client serves, its individual adapter goes on from the shared one by itself
(c = 1). Which of the two adapters w is for is not certain: the authors' code gives it to the other.

Both phases of a round start from the *received* shared adapter, so neither sees what the other
does and their order is free. Here the shared one comes first: it then trains on the very batches
of FedIT.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Plan, Similarity, Sum, names_of
from fedalt.core.tree import Name, Tree, merge, move, select
from fedalt.methods.checks import check, only_with
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Embed, Fit, Fitted

SHARED = "shared"
INDIVIDUAL = "individual"
INDIVIDUAL_HEAD = "individual_head"
REFERENCES = Name("", "references", "E")


@dataclass(frozen=True)
class Server:
    """The averaged adapter, and how many rounds are done."""

    TAG: ClassVar = "feddpa/server"

    adapter: Tree
    rounds: int = 0


@dataclass(frozen=True)
class Client:
    """What the client keeps; under "F" only `head`, the classifier's head of the shared adapter.

    `individual` holds the individual adapter and, in a slot of its own, the head trained with it;
    `references` the embeddings e(x_i), (examples, hidden), from its first individual phase on.
    """

    TAG: ClassVar = "feddpa/client"

    head: Tree
    individual: Tree = field(default_factory=dict)
    references: Tree = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FedDPA:
    """The method; clients that sit out a round keep what is theirs and do not count in its mean.

    `blend` in [0, 1] is c, for "T" alone, `references` S, `scale` in [0, 1] lambda. `similarity_on`
    is the adapter that w is for, the other one gets 1 - w. `tail_epochs`: how long the individual
    adapter of "F" trains; None for the run's local epochs.

    c, S and lambda are the defaults of the authors' code.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    schedule: Literal["T", "F"] = "T"
    blend: float = 0.5
    references: int = 5
    scale: float = 0.5
    similarity_on: Literal["individual", "shared"] = "individual"
    tail_epochs: int | None = None

    server_state = Server
    client_state = Client
    averages = True
    without = kept_in_averages

    def __post_init__(self) -> None:
        check(self, blend="[0, 1]", scale="[0, 1]", references="[1, inf)", tail_epochs="[0, inf)")
        only_with(self, "schedule", "T", "blend")
        only_with(self, "schedule", "F", "tail_epochs")

    def init_server(self, init: Initializer) -> Server:
        return Server(init.adapter(self.lora.slot(SHARED)))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """The individual adapter of "T": A drawn apart from the shared one, B zero, its own head.

        That of "F" is no second draw: it goes on from the shared adapter before the client serves.
        """
        if self.schedule == "F":
            return Client(init.head())
        individual = init.adapter(self.lora.slot(INDIVIDUAL), apart=True)
        return Client(init.head(), merge(individual, move(init.head(), HEAD, INDIVIDUAL_HEAD)))

    def broadcast(self, server: Server, client_id: str) -> Message:
        return Message(server.adapter, {"round": server.rounds})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """The shared phase and, under "T" and once there is something to share, the individual one.

        Only the shared adapter is sent back.
        """
        before = self.shared(client, message)
        fitted: Fitted = yield Fit(before.plan, before.tree, frozenset(before.tree))
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        head = select(fitted.tree, HEAD)
        if self.schedule == "F" or not message.facts["round"]:
            return Client(head, client.individual, client.references), upload
        plan = self._both(Sum((self.blend, 1 - self.blend)))
        tree = merge(_bound(client.individual), message.tree)
        fitted = yield Fit(plan, tree, names_of(tree, INDIVIDUAL, HEAD), head=INDIVIDUAL_HEAD)
        own = select(fitted.tree, INDIVIDUAL, HEAD)
        embedded: Tensor = yield Embed(self.lora.plan(INDIVIDUAL), own, self.references)
        individual = merge(select(own, INDIVIDUAL), move(own, HEAD, INDIVIDUAL_HEAD))
        return Client(head, individual, {REFERENCES: embedded}), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        return Server(weighted_mean(replies) or server.adapter, server.rounds + 1)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """Both adapters, weighed question by question; without a trained own one, the shared."""
        if self.schedule == "F":
            own = merge(move(message.tree, SHARED, INDIVIDUAL), client.head)
            plan = self.lora.plan(INDIVIDUAL)
            fitted = yield Fit(plan, own, frozenset(own), self.tail_epochs, head=INDIVIDUAL_HEAD)
            own = fitted.tree
            embedded: Tensor = yield Embed(plan, own, self.references)
        elif client.references:
            own, embedded = _bound(client.individual), client.references[REFERENCES]
        else:
            return self.shared(client, message)
        weighed = Similarity(self.scale, on=int(self.similarity_on == "shared"), embeds=0)
        return Serving(self._both(weighed), merge(own, message.tree), embedded)

    def shared(self, client: Client, message: Message) -> Serving:
        """The shared adapter alone, with its head."""
        return Serving(self.lora.plan(SHARED), merge(message.tree, client.head))

    def _both(self, combine: Sum | Similarity) -> Plan:
        return replace(self.lora.plan(INDIVIDUAL, SHARED), combine=combine)


def _bound(individual: Tree) -> Tree:
    """The individual adapter and its head, as a plan needs them."""
    return merge(select(individual, INDIVIDUAL), move(individual, INDIVIDUAL_HEAD, HEAD))
