"""FediLoRA: the owner-only mean of rank rows, and clients that repair their strangest layer.

Yang et al.: "FediLoRA: Heterogeneous LoRA for Federated Multimodal Fine-tuning under Missing
Modalities", arXiv 2509.06984. Rank row j is averaged over the clients that own it (r_k > j):

    server      A[j] <- sum_k p_k A_k[j] / sum_k p_k over these k,   columns of B likewise
    client k    after training, on the one site where c = cos(A_k, A) is least, if c < limit:
                A_k <- (1 - c) A + c A_k,   A: the first r_k rows of what the round began with

The mean and the repair are those of the authors' code, read and not run. Ours: c below 0 counts as
0, where the code would step away from A, and B gets the mean that the paper gives it (in the code
the later rows of all B but the first client's are dropped).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import cosine_similarity, one_hot

from fedalt.core.tree import Tree
from fedalt.methods.checks import check
from fedalt.methods.contract import Local, Message
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora, Weighting
from fedalt.methods.own_ranks import (
    Client,
    Server,
    drawn_client,
    nothing_yet,
    require_ranks,
    send_own_rows,
    serve_own_rows,
    train_own_rows,
)
from fedalt.methods.rank_rows import fill_up, mean_of_rows


@dataclass(frozen=True, kw_only=True)
class FediLoRA:
    """The method; clients that sit out a round do not count in its mean.

    `ranks`: rank by client id; all others have that of `lora`. `limit` in [0, 1]: a site whose
    cosine reaches it needs no repair; 0 repairs nothing but what has turned round.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    ranks: Mapping[str, int] = field(default_factory=dict)
    limit: float = 0.95

    server_state = Server
    client_state = Client
    averages = False
    init_server = nothing_yet
    init_client = drawn_client
    broadcast = send_own_rows
    shared = serve_own_rows
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        require_ranks(self.ranks)
        check(self, limit="[0, 1]")

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train an adapter of the client's rank, repair it, send it back.

        In the first round there is no common adapter to repair it with.
        """
        begun = serve_own_rows(self, client, message).tree
        client, upload = yield from train_own_rows(self, client, message)
        if message.tree:
            upload = replace(upload, tree=repaired(upload.tree, begun, self.limit))
        return client, upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The mean over owners; rows that nobody in the cohort owns stay as they are."""
        return Server(fill_up(mean_of_rows(replies), server.adapter))


def repaired(adapter: Tree, begun: Tree, limit: float) -> Tree:
    """The adapter, on one site moved towards the one it began as.

    Without a branch on any number: what an upload looks like is found without numbers.
    """
    names = sorted(name for name in adapter if name.factor == "A")
    alike = torch.stack(
        [cosine_similarity(adapter[name].flatten(), begun[name].flatten(), dim=0) for name in names]
    )
    strangest = one_hot(alike.argmin(), len(names)).bool()
    kept = torch.where(strangest & (alike < limit), alike.clamp(0, 1), 1.0)
    moved = {
        name: keep * adapter[name] + (1 - keep) * begun[name]
        for name, keep in zip(names, kept, strict=True)
    }
    return {**adapter, **moved}
