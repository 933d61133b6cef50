"""FlexLoRA, FLoRIST and the owner-only mean: one shared LoRA for clients of different ranks.

FlexLoRA      Bai, Chen, Qian, Yao, Li: "Federated Fine-tuning of Large Language Models under
              Heterogeneous Tasks and Client Resources", arXiv 2402.11505. The sum of the clients'
              products, of which each client gets the strongest directions it has rows for:
                  sum_k p_k B_k A_k = U S V^T,    client k: the first r_k columns of U, S, V
FLoRIST       Ramesh, Dass: "FLoRIST: Singular Value Thresholding for Efficient and Accurate
              Federated Fine-Tuning of Large Language Models", arXiv 2506.09199. The same sum, on
              every site cut for all at the least p with sum_{i<=p} S_i^2 >= tau sum_i S_i^2
hetlora_mean  Rank row by rank row, the mean over the clients that own it:
                  A[j] = sum_{k: r_k > j} p_k A_k[j] / sum_{k: r_k > j} p_k,   columns of B likewise
              Cho, Liu, Xu, Fahrezi, Joshi: "Heterogeneous LoRA for Federated Fine-tuning of
              On-Device Foundation Models", arXiv 2401.06432, fill missing rows with zeros, which
              dilutes the others'. To leave them out is the padding of Byun, Lee, arXiv 2406.17477
              (for two ranks the same), and the mean of Yang et al.: "FediLoRA", arXiv 2509.06984.

All clients have one scaling s = alpha / rank whatever their own rank (their slot's alpha is s r_k),
so that products may be added without it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fedalt.adapters.plan import HEAD, Slot, names_of, single
from fedalt.adapters.start import Start
from fedalt.core.tree import Name, Tree, cast, merge, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.low_rank_sums import Split, core_svd, energy_rank, factors, strongest
from fedalt.methods.rank_rows import fill_up, first_rows, mean_of_rows, rank_of, stacked
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"


@dataclass(frozen=True)
class Server:
    """What the cohort's adapters became, strongest direction first; empty before round 0 is over.

    The rank may differ from site to site.
    """

    TAG: ClassVar = "unequal-ranks/server"

    adapter: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """`draw` fills the rows that the server has nothing for; its rank is the client's."""

    TAG: ClassVar = "unequal-ranks/client"

    draw: Tree
    head: Tree


@dataclass(frozen=True, kw_only=True)
class UnequalRanks:
    """The three methods; clients that sit out a round do not count in its sum.

    `ranks`: rank by client id; all others have that of `lora`. Of the sum of products, `tau` in
    (0, 1] is the share of the squared singular values to keep on every site (1: all directions),
    and `split` says where the singular values go: "in_b" all into B, as FlexLoRA's code has it and
    as is usual here, or "balanced" their roots into both factors. FLoRIST's split is not known, so
    a comparison shows both. Neither setting means anything to a mean of rows.
    """

    variant: Literal["flexlora", "florist", "hetlora_mean"]
    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    ranks: Mapping[str, int] = field(default_factory=dict)
    tau: float = 1.0
    split: Split | None = None

    server_state = Server
    client_state = Client
    averages = False
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        for client_id, rank in self.ranks.items():
            if rank < 1:
                raise ValueError(f"ranks: {client_id!r} has rank {rank}, but a rank is at least 1")
        check(self, tau="(0, 1]")
        if self.variant == "hetlora_mean" and (self.tau < 1 or self.split is not None):
            raise ValueError(
                "tau and split are settings of sums of products, not of a mean of rows"
            )

    def init_server(self, start: Start) -> Server:
        """Nothing yet: every client begins with its own draw."""
        return Server()

    def init_client(self, start: Start, client_id: str) -> Client:
        """The first rows of one draw for all clients: row j begins the same wherever there is one.

        B is zero.
        """
        whole = start.adapter(Slot(SHARED, self._largest(), self.lora.alpha))
        return Client(first_rows(whole, self._rank(client_id)), start.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """As many rows as the client has; FLoRIST sends everybody the same."""
        if self.variant == "florist":
            return Message(server.adapter)
        return Message(first_rows(server.adapter, self._rank(client_id)))

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train an adapter of the client's rank and send it back."""
        before = self.shared(client, message)
        fitted: Fitted = yield Fit(before.plan, before.tree, names_of(before.tree, SHARED, HEAD))
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        return Client(client.draw, select(fitted.tree, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The sum or the mean; a mean keeps the rows that nobody in the cohort owns."""
        if self.variant == "hetlora_mean":
            return Server(fill_up(mean_of_rows(replies), server.adapter))
        summed = self._sum_of_products(replies)
        return Server(summed) if summed else server

    def shared(self, client: Client, message: Message) -> Serving:
        """The server's adapter as this client gets it; rows without a direction are as drawn."""
        own = rank_of(client.draw)
        slot = Slot(SHARED, own, self.lora.slot(SHARED).scaling * own)
        adapter = fill_up(first_rows(message.tree, own), client.draw)
        return Serving(single(slot, self.lora.dropout), merge(adapter, client.head))

    def _rank(self, client_id: str) -> int:
        return self.ranks.get(client_id, self.lora.rank)

    def _largest(self) -> int:
        return max((self.lora.rank, *self.ranks.values()))

    def _sum_of_products(self, replies: Iterable[tuple[str, Message]]) -> Tree:
        stacks, weight = stacked(replies, SHARED)
        tree: Tree = {}
        for site in sorted(stacks):
            directions = core_svd(stacks.pop(site))
            directions = strongest(directions, energy_rank(directions.s, self.tau))
            if self.variant == "flexlora":
                directions = strongest(directions, self._largest())  # nobody can hold more
            mean = directions._replace(s=directions.s / weight)
            b, a = factors(mean, self.split or "in_b")
            tree[Name(site, SHARED, "A")], tree[Name(site, SHARED, "B")] = a, b
        return cast(tree, torch.float32)
