"""FSLoRA: one adapter of a high rank, of which each client trains a random sketch.

Fang, Han, Yuan, Hosseinalipour, Brinton: "Federated Sketching LoRA: A Flexible Framework for
Heterogeneous Collaborative Fine-Tuning of Large Language Models", arXiv 2501.19389. The server
holds A (R, d_in) and B (d_out, R). In every round and on every site, I_k are r_k of the R rank
rows, drawn anew:

    client k    y = W0 x + s B S_k A x,   S_k = R / r_k on the diagonal at I_k, else 0:   E[S_k] = 1
                trains A[I_k] and B[:, I_k], and sends what changed: dA_k, dB_k
    server      A <- A + sum_k p_k dA_k,   B <- B + sum_k p_k dB_k,   put at I_k, else 0

With s = alpha / R, the client's scaling s R / r_k is alpha / r_k: a plain LoRA of its own rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Slot, names_of, single
from fedalt.core.seeds import generator, seed_of
from fedalt.core.tree import Name, Tree, accumulate, add, cast, merge, scale, select, subtract
from fedalt.methods.checks import check
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.own_ranks import SHARED, largest_rank, rank_for, require_ranks
from fedalt.methods.rank_rows import put, rank_of, taken
from fedalt.training.orders import Fit, Fitted


@dataclass(frozen=True)
class Server:
    """The adapter of rank R, how many rounds are done, and the run's seed, to know sketches by."""

    TAG: ClassVar = "fslora/server"

    adapter: Tree
    seed: int
    rounds: int = 0


@dataclass(frozen=True)
class Client:
    """A classifier's head, the client's rank, and the seed of its sketches."""

    TAG: ClassVar = "fslora/client"

    head: Tree
    rank: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class FSLoRA:
    """The method; clients that sit out a round do not count in its mean.

    `ranks`: r_k by client id; all others have that of `lora`. `whole_rank` is R; unset, it is twice
    the largest rank of a client. With R = r_k this is FedIT.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    ranks: Mapping[str, int] = field(default_factory=dict)
    whole_rank: int | None = None

    server_state = Server
    client_state = Client
    averages = False
    renewed = True
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        require_ranks(self.ranks)
        check(self, whole_rank="[1, inf)")
        if self._whole.rank < largest_rank(self):
            raise ValueError(
                f"whole_rank={self.whole_rank}, but a client has rank {largest_rank(self)}, and a "
                "sketch has no more rows than the whole"
            )

    def init_server(self, init: Initializer) -> Server:
        return Server(init.adapter(self._whole), init.seed)

    def init_client(self, init: Initializer, client_id: str) -> Client:
        return Client(init.head(), rank_for(self, client_id), seed_of(init.seed, client_id))

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The whole adapter: a client trains a sketch of it, but serves all."""
        return Message(server.adapter, {"round": server.rounds})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the round's sketch and send what changed of it."""
        number = int(message.facts["round"])
        rows = sketch(client.seed, number, message.tree, self._whole.rank, client.rank)
        part = taken(message.tree, rows)
        plan = single(Slot(SHARED, client.rank, self.lora.alpha), self.lora.dropout)
        tree = merge(part, client.head)
        fitted: Fitted = yield Fit(plan, tree, names_of(tree, SHARED, HEAD))
        facts = {"weight": weight_of(fitted, self.weighting), "round": number}
        change = subtract(select(fitted.tree, SHARED), part)
        return replace(client, head=select(fitted.tree, HEAD)), Message(change, facts)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Every change at its rows, divided by the weight of all clients, not of a row's alone."""
        changes: Tree = {}
        total = 0.0
        for client_id, upload in replies:
            weight, number = float(upload.facts["weight"]), int(upload.facts["round"])
            seed, rank = seed_of(server.seed, client_id), rank_of(upload.tree)
            rows = sketch(seed, number, upload.tree, self._whole.rank, rank)
            accumulate(changes, put(upload.tree, rows, self._whole.rank), weight)
            total += weight
        mean = scale(changes, 1 / total) if total else {}
        adapter = cast(add(mean, server.adapter), torch.float32) if mean else server.adapter
        return replace(server, adapter=adapter, rounds=server.rounds + 1)

    def shared(self, client: Client, message: Message) -> Serving:
        """The whole adapter; all of it is shared, but for the head."""
        return Serving(single(self._whole, self.lora.dropout), merge(message.tree, client.head))

    @property
    def _whole(self) -> Slot:
        rank = 2 * largest_rank(self) if self.whole_rank is None else self.whole_rank
        return Slot(SHARED, rank, self.lora.alpha)


def sketch(
    seed: int, number: int, adapter: Mapping[Name, Tensor], whole: int, rank: int
) -> Mapping[str, Sequence[int]]:
    """Which `rank` of the `whole` rank rows of each site a client trains in round `number`, rising.

    A site's rows depend on no other site; its A and B have one choice.
    """

    def drawn(site: str) -> Sequence[int]:
        stream = generator(seed, "sketch", number, site)
        order: list[int] = torch.randperm(whole, generator=stream, device="cpu").tolist()
        return sorted(order[:rank])

    return {site: drawn(site) for site in {name.site for name in adapter}}
