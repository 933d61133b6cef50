"""FFA-LoRA, FedSA-LoRA, RoLoRA: one factor of a LoRA is averaged at a time, not both.

FFA-LoRA     Sun, Li, Li, Ding: "Improving LoRA in Privacy-preserving Federated Learning", arXiv
             2403.12313. A stays as drawn, the same everywhere; B is trained and averaged:
             sum_k p_k (B_k A) = (sum_k p_k B_k) A, exactly
FedSA-LoRA   Guo, Zeng, Wang, Fan, Wang, Qu: "Selective Aggregation for Low-Rank Adaptation in
             Federated Learning", arXiv 2410.01463. Both are trained, A <- sum_k p_k A_k, and each
             client keeps a B of its own: W0 + s B_k A
RoLoRA       Chen, Guo, Ju, Dalal, Zhu, Khisti: "Robust Federated Finetuning of LLMs via
             Alternating Optimization of LoRA", arXiv 2502.01755. B is trained and averaged in even
             rounds, A in odd ones, while the other stays: each average is exact, as in FFA-LoRA

RoLoRA begins with B: as long as B is 0, A has no gradient.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, merge, replace, select
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import at_once, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"

Variant = Literal["ffa_lora", "fedsa_lora", "rolora"]
# The factors that the server holds and sends; a client keeps the others for itself.
_SENT: Mapping[Variant, str] = {"ffa_lora": "B", "fedsa_lora": "A", "rolora": "AB"}


@dataclass(frozen=True)
class Server:
    """The averaged factors, and how many rounds are done."""

    TAG: ClassVar = "shared-factors/server"

    factors: Tree
    rounds: int = 0


@dataclass(frozen=True)
class Client:
    """The factors that the server does not send (FFA's common A, FedSA's own B), and the head."""

    TAG: ClassVar = "shared-factors/client"

    kept: Tree
    head: Tree


@dataclass(frozen=True, kw_only=True)
class SharedFactors:
    """The three methods; clients that sit out a round do not count in its mean."""

    variant: Variant
    lora: Lora = Lora()
    weighting: Weighting = "uniform"

    server_state = Server
    client_state = Client
    averages = True
    without = kept_in_averages

    @property
    def renewed(self) -> bool:
        """RoLoRA's clients never train what they trained in the round before."""
        return self.variant == "rolora"

    def init_server(self, init: Initializer) -> Server:
        """A drawn, B zero, as far as they are sent."""
        adapter = init.adapter(self.lora.slot(SHARED))
        return Server(_factors(adapter, _SENT[self.variant]))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """The other factors of the same draw, which therefore need not cross the wire."""
        adapter = init.adapter(self.lora.slot(SHARED))
        kept = {name: adapter[name] for name in adapter if name.factor not in _SENT[self.variant]}
        return Client(kept, init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The averaged factors; RoLoRA's client gets both, as it may have missed the last round."""
        return Message(server.factors, {"round": server.rounds})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train what the variant trains in this round; send back only what is averaged."""
        tree = merge(message.tree, client.kept, client.head)
        trained = self._trained(int(message.facts["round"]))
        names = names_of(tree, HEAD) | _factors(select(tree, SHARED), trained).keys()
        fitted: Fitted = yield Fit(self.lora.plan(SHARED), tree, names)
        after = Client({name: fitted.tree[name] for name in client.kept}, select(fitted.tree, HEAD))
        upload = {name: fitted.tree[name] for name in message.tree if name.factor in trained}
        return after, Message(upload, {"weight": weight_of(fitted, self.weighting)})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The weighted mean of the factor that was trained; the other stays."""
        return Server(replace(server.factors, weighted_mean(replies)), server.rounds + 1)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The averaged factors with those that the client keeps."""
        tree = merge(message.tree, client.kept, client.head)
        return at_once(Serving(self.lora.plan(SHARED), tree))

    def shared(self, client: Client, message: Message) -> Serving | None:
        """All of it but the head; FedSA's A alone is no adapter, so nothing there."""
        if self.variant == "fedsa_lora":
            return None
        return Serving(self.lora.plan(SHARED), merge(message.tree, client.kept, client.head))

    def _trained(self, round_: int) -> str:
        """The factors that clients train in a round."""
        match self.variant:
            case "ffa_lora":
                return "B"
            case "fedsa_lora":
                return "AB"
            case "rolora":
                return "A" if round_ % 2 else "B"


def _factors(tree: Tree, wanted: str) -> Tree:
    """The tensors of a tree that are one of the wanted factors."""
    return {name: tensor for name, tensor in tree.items() if name.factor in wanted}
