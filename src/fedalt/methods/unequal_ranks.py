"""FlexLoRA, FLoRIST and the owner-only mean: one shared LoRA for clients of different ranks.

FlexLoRA      Bai, Chen, Qian, Yao, Li: "Federated Fine-tuning of Large Language Models under
              Heterogeneous Tasks and Client Resources", arXiv 2402.11505. The sum of the clients'
              products, of which each client gets the strongest directions it has rows for:
                  sum_k p_k B_k A_k = U S V^T,    client k: the first r_k columns of U, S, V
FLoRIST       Ramesh, Dass: "FLoRIST: Singular Value Thresholding for Efficient and Accurate
              Federated Fine-Tuning of Large Language Models", arXiv 2506.09199. The same sum, on
              every site cut for all at the least p with sum_{i<=p} S_i^2 >= tau sum_i S_i^2
owner_mean    Rank row by rank row, the mean over the clients that own it:
                  A[j] = sum_{k: r_k > j} p_k A_k[j] / sum_{k: r_k > j} p_k,   columns of B likewise
              The padding of Byun, Lee, arXiv 2406.17477 (for two ranks the same), and the mean of
              Yang et al.: "FediLoRA", arXiv 2509.06984 (fedilora.py adds its repair of layers).
              HetLoRA (hetlora.py) fills missing rows with zeros instead, which dilutes the others'.

All clients have one scaling s = alpha / rank whatever their own rank (their slot's alpha is s r_k),
so that products may be added without it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from fedalt.core.tree import Name, Tree, cast
from fedalt.methods.checks import check
from fedalt.methods.contract import Message
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora, Weighting
from fedalt.methods.low_rank_sums import Split, core_svd, energy_rank, factors, strongest
from fedalt.methods.own_ranks import (
    SHARED,
    Client,
    Server,
    drawn_client,
    largest_rank,
    nothing_yet,
    require_ranks,
    send_own_rows,
    serve_own_rows,
    train_own_rows,
)
from fedalt.methods.rank_rows import fill_up, mean_of_rows, stacked


@dataclass(frozen=True, kw_only=True)
class UnequalRanks:
    """The three methods; clients that sit out a round do not count in its sum.

    `ranks`: rank by client id; all others have that of `lora`. Of the sum of products, `tau` in
    (0, 1] is the share of the squared singular values to keep on every site (1: all directions),
    and `split` says where the singular values go: "in_b" all into B, as FlexLoRA's code has it and
    as is usual here, or "balanced" their roots into both factors. FLoRIST's split is not known, so
    a comparison shows both. Neither setting means anything to a mean of rows.
    """

    variant: Literal["flexlora", "florist", "owner_mean"]
    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    ranks: Mapping[str, int] = field(default_factory=dict)
    tau: float = 1.0
    split: Split | None = None

    server_state = Server
    client_state = Client
    averages = False
    init_server = nothing_yet
    init_client = drawn_client
    local = train_own_rows
    shared = serve_own_rows
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        require_ranks(self.ranks)
        check(self, tau="(0, 1]")
        if self.variant == "owner_mean" and (self.tau < 1 or self.split is not None):
            raise ValueError(
                "tau and split are settings of sums of products, not of a mean of rows"
            )

    @property
    def renewed(self) -> bool:
        """A sum's rows are its directions by strength, others in every round; a mean's stay."""
        return self.variant != "owner_mean"

    def broadcast(self, server: Server, client_id: str) -> Message:
        """As many rows as the client has; FLoRIST sends everybody the same."""
        if self.variant == "florist":
            return Message(server.adapter)
        return send_own_rows(self, server, client_id)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The sum or the mean; a mean keeps the rows that nobody in the cohort owns."""
        if self.variant == "owner_mean":
            return Server(fill_up(mean_of_rows(replies), server.adapter))
        summed = self._sum_of_products(replies)
        return Server(summed) if summed else server

    def _sum_of_products(self, replies: Iterable[tuple[str, Message]]) -> Tree:
        stacks, weight = stacked(replies, SHARED)
        tree: Tree = {}
        for site in sorted(stacks):
            directions = core_svd(stacks.pop(site))
            directions = strongest(directions, energy_rank(directions.s, self.tau))
            if self.variant == "flexlora":
                directions = strongest(directions, largest_rank(self))  # nobody can hold more
            mean = directions._replace(s=directions.s / weight)
            b, a = factors(mean, self.split or "in_b")
            tree[Name(site, SHARED, "A")], tree[Name(site, SHARED, "B")] = a, b
        return cast(tree, torch.float32)
