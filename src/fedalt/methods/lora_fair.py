"""LoRA-FAIR: averaged factors, with B corrected so that B A comes close to the mean of products.

Bian, Wang, Zhang, Xu: "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", arXiv 2411.14961. A reconstruction: of the correction only its aim is known to us,

    dB = argmin S(W*, (B + dB) A) + lambda |dB|      A, B = sum_k p_k A_k, sum_k p_k B_k
                                                     W*   = sum_k p_k B_k A_k

with a likeness S that readers call a cosine. Here S is |W* - (B + dB) A|_F^2 and the norm squared,
which is ridge regression and has one solution; the next round starts from A and B + dB:

    dB = (W* - B A) A^T (A A^T + lambda I)^-1
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.low_rank_sums import Pair
from fedalt.methods.mean import Totals
from fedalt.methods.product_means import ProductTotals
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"


@dataclass(frozen=True)
class Server:
    """The mean of A and the corrected mean of B."""

    TAG: ClassVar = "lora-fair/server"

    adapter: Tree


@dataclass(frozen=True)
class Client:
    """Only a classifier's head is the client's own."""

    TAG: ClassVar = "lora-fair/client"

    head: Tree


@dataclass(frozen=True, kw_only=True)
class LoRAFAIR:
    """The method; clients that sit out a round do not count in its means.

    `ridge` > 0 is lambda: the smaller, the closer the product comes to the mean of products; from
    a large one on it is FedIT. 0.01 is what readers give for the paper's form, whose S is another.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    ridge: float = 0.01

    server_state = Server
    client_state = Client
    averages = False  # of products too
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        check(self, ridge="(0, inf)")

    def init_server(self, init: Initializer) -> Server:
        return Server(init.adapter(self.lora.slot(SHARED)))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        return Client(init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        return Message(server.adapter)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the shared adapter on the client's data and send it back."""
        tree = merge(message.tree, client.head)
        fitted: Fitted = yield Fit(self.lora.plan(SHARED), tree, names_of(tree, SHARED, HEAD))
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        return Client(select(fitted.tree, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The means of both factors, and B corrected on every site."""
        factors, products = Totals(), ProductTotals()
        for _, upload in replies:
            factors.add(0, upload)
            products.add(0, upload)
        adapter = dict(factors.means()).get(0, server.adapter)
        for name, product in dict(products.means()).get(0, {}).items():
            mean = Pair(adapter[name], adapter[name._replace(factor="A")])
            adapter = {**adapter, name: corrected(mean, product, self.ridge)}
        return Server(adapter)

    def shared(self, client: Client, message: Message) -> Serving:
        """All of it is shared, but for the head."""
        return Serving(self.lora.plan(SHARED), merge(message.tree, client.head))


def corrected(mean: Pair, product: Pair, ridge: float) -> Tensor:
    """B + dB of a mean pair, such that (B + dB) A comes close to a product of any rank; float32.

    Computed in float64 from matrices of the rank's size: W* A^T is the product's B times the
    product of two A.
    """
    a, b = mean.a.double(), mean.b.double()
    gram = a @ a.T
    residual = product.b @ (product.a @ a.T) - b @ gram
    eye = torch.eye(len(a), dtype=torch.float64)
    correction: Tensor = torch.linalg.solve(gram + ridge * eye, residual.T).T
    return (b + correction).float()
