"""FedIT: federated averaging of one LoRA, factor by factor.

Zhang et al.: "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644.
Every round all clients start from the same adapter, train it, and the server averages:

    A <- sum_k p_k A_k,    B <- sum_k p_k B_k,    p_k = 1/K or n_k / sum n

Averaging factors is not averaging products: mean(B_k A_k) - mean(B) mean(A) is the covariance of
the factors over the clients.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"


@dataclass(frozen=True)
class Server:
    """The averaged adapter."""

    TAG: ClassVar = "fedit/server"

    adapter: Tree


@dataclass(frozen=True)
class Client:
    """Only a classifier's head is the client's own; a causal model has none."""

    TAG: ClassVar = "fedit/client"

    head: Tree


@dataclass(frozen=True, kw_only=True)
class FedIT:
    """The method; clients that sit out a round do not count in its mean."""

    lora: Lora = Lora()
    weighting: Weighting = "uniform"

    server_state = Server
    client_state = Client
    averages = True
    deploy = deploy_shared
    without = kept_in_averages

    def init_server(self, init: Initializer) -> Server:
        return Server(init.adapter(self.lora.slot(SHARED)))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        return Client(init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        return Message(server.adapter)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the averaged adapter on the client's data and send it back."""
        tree = merge(message.tree, client.head)
        fitted: Fitted = yield Fit(self.lora.plan(SHARED), tree, names_of(tree, SHARED, HEAD))
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        return Client(select(fitted.tree, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        return Server(weighted_mean(replies) or server.adapter)

    def shared(self, client: Client, message: Message) -> Serving:
        """All of it is shared, but for the head."""
        return Serving(self.lora.plan(SHARED), merge(message.tree, client.head))
