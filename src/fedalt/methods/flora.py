"""FLoRA: adapters are stacked, not averaged; their exact sum joins the base, and all start anew.

Wang, Shen, He, Sun, Wang, Lyu, Li: "FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations", arXiv 2409.05976. With W the base model and all that was added
to it, in every round:

    client k    y = W x + s B_k A_k x,   A_k of the client's own rank drawn anew, B_k = 0
    server      A = [p_1 A_1; ..; p_K A_K],   B = [B_1, .., B_K]:   B A = sum_k p_k B_k A_k, exactly
                W <- W + s B A

What was added to W is a slot that nobody trains (frozen_side.py), cut exactly to its rank, which is
at most min(d_out, d_in). It is sent whole in every round, so that nobody has to be there always.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedalt.adapters.initializer import Initializer, drawn_again
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, select
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.frozen_side import added, alone, on_top
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.own_ranks import SHARED, first_draw, own_slot, require_ranks
from fedalt.methods.rank_rows import rank_of, stacked
from fedalt.training.orders import Fit, Fitted


@dataclass(frozen=True)
class Server:
    """The sum of all rounds, empty at first, and how many rounds are done."""

    TAG: ClassVar = "flora/server"

    frozen: Tree = field(default_factory=dict)
    rounds: int = 0


@dataclass(frozen=True)
class Client:
    """The client's first adapter, a classifier's head, and the run's seed, to draw anew from."""

    TAG: ClassVar = "flora/client"

    draw: Tree
    head: Tree
    seed: int


@dataclass(frozen=True, kw_only=True)
class FLoRA:
    """The method; clients that sit out a round do not count in its sum.

    `ranks`: rank by client id; all others have that of `lora`. All have one scaling s.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    ranks: Mapping[str, int] = field(default_factory=dict)

    server_state = Server
    client_state = Client
    averages = False
    renewed = True
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        require_ranks(self.ranks)

    def init_server(self, init: Initializer) -> Server:
        """Nothing has been added to the base model."""
        return Server()

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """The same first A for everyone, as far as a client's rank goes; B zero."""
        return Client(first_draw(self, init, client_id), init.head(), init.seed)

    def broadcast(self, server: Server, client_id: str) -> Message:
        """All that was added to the base model, the same for every client."""
        return Message(server.frozen, {"round": server.rounds})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train a new adapter on top of what was added, and send it."""
        fresh = drawn_again(client.draw, client.seed, int(message.facts["round"]))
        slot = own_slot(self, rank_of(client.draw))
        before = on_top(message.tree, slot, fresh, client.head, self.lora.dropout)
        fitted: Fitted = yield Fit(before.plan, before.tree, names_of(before.tree, SHARED, HEAD))
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        return replace(client, head=select(fitted.tree, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The stack of the cohort's adapters joins what was added before."""
        stacks, weight = stacked(replies, SHARED)
        frozen = added(server.frozen, stacks, 1 / weight) if stacks else server.frozen
        return Server(frozen, server.rounds + 1)

    def shared(self, client: Client, message: Message) -> Serving:
        """What was added; a new adapter adds nothing. At first, what everybody draws."""
        slot = own_slot(self, rank_of(client.draw))
        if message.tree:
            return alone(message.tree, slot.scaling, client.head, self.lora.dropout)
        return on_top({}, slot, client.draw, client.head, self.lora.dropout)
