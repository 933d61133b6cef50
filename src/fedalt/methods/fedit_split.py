"""FedIT-split: FedIT with its LoRA cut into several smaller ones side by side.

A comparison of Bian et al.: "FedALT", arXiv 2503.11880, which asks whether splitting alone keeps
clients from interfering with each other. With n parts of ranks r_j that sum to r, on every site:

    y = W0 x + s sum_j B_j A_j x,    A_j <- sum_k p_k A_jk,    B_j <- sum_k p_k B_jk

As sum_j B_j A_j = [B_1 .. B_n] [A_1; ..; A_n], and as averaging, AdamW and weight decay act entry
by entry, this *is* FedIT of rank r, whatever one measures. It differs only where a mixer weighs the
parts, token by token; whether the paper's had one is not known.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Mixer, Plan, Slot, Sum
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.contract import Local, Message, Serving
from fedalt.methods.defaults import deploy_shared, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Fit, Fitted


@dataclass(frozen=True)
class Server:
    """The averaged parts and, if there is one, the averaged mixer."""

    TAG: ClassVar = "fedit-split/server"

    adapters: Tree


@dataclass(frozen=True)
class Client:
    """Only a classifier's head is the client's own; a causal model has none."""

    TAG: ClassVar = "fedit-split/client"

    head: Tree


@dataclass(frozen=True, kw_only=True)
class FedITSplit:
    """The method; its parts together have the rank and, each, the scaling of one LoRA.

    `parts`: how many, of ranks that differ by at most 1. `mixer`: weigh them by one (a softmax
    over parts for every token) that is averaged like the factors, instead of adding them up; as the
    weights of a token sum to 1, a step then moves the output less than FedIT's.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    parts: int = 2
    mixer: bool = False

    server_state = Server
    client_state = Client
    averages = True
    deploy = deploy_shared
    without = kept_in_averages

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= self.lora.rank:
            raise ValueError(
                f"parts={self.parts} of a LoRA of rank {self.lora.rank}, but there is at least one "
                "part, and each has at least rank 1"
            )

    def init_server(self, init: Initializer) -> Server:
        """The very draw that FedIT starts from, cut into parts."""
        mixer = init.mixer(self.parts) if self.mixer else {}
        return Server(merge(self._split(init.adapter(self.lora.slot("whole"))), mixer))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        return Client(init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        return Message(server.adapters)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train all parts, and the mixer, and send them back."""
        tree = merge(message.tree, client.head)
        fitted: Fitted = yield Fit(self._plan(), tree, frozenset(tree))
        trained = {name: fitted.tree[name] for name in message.tree}
        weight = weight_of(fitted, self.weighting)
        return Client(select(fitted.tree, HEAD)), Message(trained, {"weight": weight})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The weighted mean of the cohort's parts, each for itself, and of its mixers."""
        return Server(weighted_mean(replies) or server.adapters)

    def shared(self, client: Client, message: Message) -> Serving:
        """All of it is shared, but for the head."""
        return Serving(self._plan(), merge(message.tree, client.head))

    def _slots(self) -> tuple[Slot, ...]:
        """The parts; the first ones take what does not divide evenly."""
        rank, more = divmod(self.lora.rank, self.parts)
        ranks = [rank + (part < more) for part in range(self.parts)]
        scaling = self.lora.slot("whole").scaling
        return tuple(Slot(f"part_{i}", rank, scaling * rank) for i, rank in enumerate(ranks))

    def _split(self, whole: Tree) -> Tree:
        """The rank rows of one adapter, given to the parts in their order."""
        slots = self._slots()
        tree: Tree = {}
        for name, tensor in whole.items():
            pieces = tensor.split([slot.rank for slot in slots], 0 if name.factor == "A" else 1)
            for slot, piece in zip(slots, pieces, strict=True):
                tree[name._replace(slot=slot.name)] = piece
        return tree

    def _plan(self) -> Plan:
        combine = Mixer() if self.mixer else Sum((1.0,) * self.parts)
        return Plan(self._slots(), combine, self.lora.dropout)
