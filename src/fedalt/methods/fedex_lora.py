"""FedEx-LoRA: factors are averaged, and what their average misses joins the base.

Singhal, Ponkshe, Vepakomma: "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning
of Large Language Models", arXiv 2410.09432. With W the base model and all that was added to it:

    client k    y = W x + s B_k A_k x, from the averages
    server      A <- sum_k p_k A_k,   B <- sum_k p_k B_k
                W <- W + s (sum_k p_k B_k A_k - B A)

so that W + s B A becomes W + s sum_k p_k B_k A_k, exactly. The residual is the covariance of the
factors over the clients and has at most rank (K - 1) r. What was added to W is a slot that nobody
trains (frozen_side.py), cut exactly to its rank, which is at most min(d_out, d_in).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, add, cast, merge, scale, select, subtract
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.frozen_side import FROZEN, added, on_top
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.low_rank_sums import Pair
from fedalt.methods.rank_rows import pairs_of, stack_up
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"


@dataclass(frozen=True)
class Server:
    """The averaged adapter, and all residuals so far; at first there are none."""

    TAG: ClassVar = "fedex-lora/server"

    adapter: Tree
    frozen: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """Only a classifier's head is the client's own; a causal model has none."""

    TAG: ClassVar = "fedex-lora/client"

    head: Tree


@dataclass(frozen=True, kw_only=True)
class FedExLoRA:
    """The method; clients that sit out a round do not count in its mean."""

    lora: Lora = Lora()
    weighting: Weighting = "uniform"

    server_state = Server
    client_state = Client
    averages = False
    deploy = deploy_shared
    without = kept_in_averages

    def init_server(self, init: Initializer) -> Server:
        return Server(init.adapter(self.lora.slot(SHARED)))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        return Client(init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The averages and all residuals, so that nobody has to be there always."""
        return Message(merge(server.adapter, server.frozen))

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the averaged adapter on top of the residuals and send it back."""
        before = self.shared(client, message)
        fitted: Fitted = yield Fit(before.plan, before.tree, names_of(before.tree, SHARED, HEAD))
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        return Client(select(fitted.tree, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The averages, one upload at a time, and what they miss.

        With m the mean so far, w an upload's weight and v all weight up to it, the sums of
        w (1 - w / v) (B_k - m_B)(A_k - m_A) are the covariance's: equal clients have none, exactly.
        """
        mean: Tree = {}
        missed: dict[str, Pair] = {}
        total = 0.0
        for _, upload in replies:
            weight, factors = float(upload.facts["weight"]), cast(upload.tree, torch.float64)
            total += weight
            gap = subtract(factors, mean) if mean else {}
            for site, pair in pairs_of(gap, SHARED):
                stack_up(missed, site, pair, weight * (1 - weight / total))
            mean = add(mean, scale(gap, weight / total)) if mean else factors
        if not mean:
            return server
        return Server(cast(mean, torch.float32), added(server.frozen, missed, 1 / total))

    def shared(self, client: Client, message: Message) -> Serving:
        """All of it is shared, but for the head."""
        adapter, frozen = select(message.tree, SHARED), select(message.tree, FROZEN)
        return on_top(frozen, self.lora.slot(SHARED), adapter, client.head, self.lora.dropout)
