"""HetLoRA: clients of different ranks, missing rows as zeros, large updates count more.

Cho, Liu, Xu, Fahrezi, Joshi: "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models", arXiv 2401.06432. With [.; 0] for the zeros below a client's r_k rows of the largest rank:

    server      A <- sum_k q_k [A_k; 0],   B <- sum_k q_k [B_k, 0],
                q_k = |B_k A_k|_F / sum_j |B_j A_j|_F,   the norm over all sites
    client k    begins its next round with the first r_k rows of A and columns of B

The paper's clients also prune their own rank while they train. That is left out: the constants that
decide when to prune were not found.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt

from fedalt.core.tree import Tree
from fedalt.methods.contract import Message
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora
from fedalt.methods.low_rank_sums import padded_mean, squared_norm
from fedalt.methods.own_ranks import (
    SHARED,
    Client,
    Server,
    drawn_client,
    nothing_yet,
    require_ranks,
    send_own_rows,
    serve_own_rows,
    train_own_rows,
)
from fedalt.methods.rank_rows import fill_up, mean_of_rows, pairs_of


@dataclass(frozen=True, kw_only=True)
class HetLoRA:
    """The method; clients that sit out a round do not count in its mean.

    `ranks`: rank by client id; all others have that of `lora`.
    """

    lora: Lora = Lora()
    ranks: Mapping[str, int] = field(default_factory=dict)

    weighting = "uniform"  # the server weighs uploads itself

    server_state = Server
    client_state = Client
    averages = False
    init_server = nothing_yet
    init_client = drawn_client
    broadcast = send_own_rows
    local = train_own_rows
    shared = serve_own_rows
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        require_ranks(self.ranks)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The mean of the padded adapters; rows that nobody in the cohort has stay as they are."""
        mean = mean_of_rows(_by_norm(replies), padded_mean)
        return Server(fill_up(mean, server.adapter))


def _by_norm(replies: Iterable[tuple[str, Message]]) -> Iterator[tuple[str, Message]]:
    """The uploads, weighted by |B_k A_k|_F; those whose product is zero are left out."""
    for client_id, upload in replies:
        if norm := _norm(upload.tree):
            yield client_id, replace(upload, facts={"weight": norm})


def _norm(adapter: Tree) -> float:
    """|B A|_F, over all sites."""
    return sqrt(sum(squared_norm(pair) for _, pair in pairs_of(adapter, SHARED)))
