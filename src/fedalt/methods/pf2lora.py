"""PF2LoRA: a shared adapter trained to be good after a small individual one has followed it.

Hao, Wu, Payani, Lee, Liu: "Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic
Rank Learning Approach via Two-Level LoRA", arXiv 2503.03920. With x = (A, B) shared, of rank r, and
y = (C_k, D_k) of client k, of a smaller rank:

    W_k = W0 + s B A + s D_k C_k                                    a plain sum, nothing weighs it
    upper  min over x of  1/K sum_k f_k(x, y_k*(x))         lower  y_k*(x) = argmin_y f_k(x, y)

    a step, on its own batch and on the next one:
        y+ = y - a grad_y f(x, y; batch)                                                plain SGD
        h  = grad_x f(x, y+; next) - [d2 f / dx dy](x, y; batch) a grad_y f(x, y+; next)
        x  <- AdamW with h,   y <- y+                       server:  x <- sum_k p_k x_k
        a  = inner_lr for C_k and inner_lr / s^2 for D_k

That is plain descent with the rate inner_lr on C_k and s D_k, whose product is all that the layer
sees: sD+ = sD - inner_lr grad_sD f. What the lower level does is therefore the same for every
alpha; one rate for both factors would act through s^2.

The product with the second derivative is grad_x <grad_y f(x, y), v> with v = a grad_y f(x, y+) held
fixed. How the paper computes it and how often it communicates were not at hand: the equations are
our reading of its two levels, one communication is one round.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Plan, Slot, Sum, single
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.bilevel import Gradient, Unrolled
from fedalt.methods.checks import check
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import at_once, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"
INDIVIDUAL = "individual"


@dataclass(frozen=True)
class Server:
    """The averaged adapter."""

    TAG: ClassVar = "pf2lora/server"

    adapter: Tree


@dataclass(frozen=True)
class Client:
    """The individual adapter, and a classifier's head."""

    TAG: ClassVar = "pf2lora/client"

    kept: Tree


@dataclass(frozen=True, kw_only=True)
class PF2LoRA:
    """The method; clients that sit out a round keep what is theirs and do not count in its mean.

    `client_rank` is the rank of C_k and D_k, whose output is scaled as the shared adapter's is.
    `inner_lr` >= 0 means the same whatever alpha is (see above); unlike the learning rate of the
    run it does not fall within a round. The rank is the paper's (a quarter of the shared one);
    `inner_lr` is our choice, since the paper's was not at hand.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    client_rank: int = 2
    inner_lr: float = 0.1
    hypergradient: Gradient = "exact"

    server_state = Server
    client_state = Client
    averages = True
    without = kept_in_averages

    def __post_init__(self) -> None:
        check(self, client_rank="[1, inf)", inner_lr="[0, inf)")

    def init_server(self, init: Initializer) -> Server:
        return Server(init.adapter(self.lora.slot(SHARED)))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """C drawn apart from the shared A but the same for everyone, D zero."""
        return Client(merge(init.adapter(self._individual(), apart=True), init.head()))

    def broadcast(self, server: Server, client_id: str) -> Message:
        return Message(server.adapter)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Both levels descend together; only the shared adapter is sent back."""
        tree = merge(message.tree, client.kept)
        scaling = self._individual().scaling
        step = Unrolled(INDIVIDUAL, self.inner_lr, self.hypergradient, scaling)
        fitted: Fitted = yield Fit(self._plan(), tree, frozenset(tree), step=step)
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        return Client(select(fitted.tree, INDIVIDUAL, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        return Server(weighted_mean(replies) or server.adapter)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The shared adapter and the client's own, added."""
        return at_once(Serving(self._plan(), merge(message.tree, client.kept)))

    def shared(self, client: Client, message: Message) -> Serving:
        """The shared adapter alone, with the client's head."""
        plan = single(self.lora.slot(SHARED), self.lora.dropout)
        return Serving(plan, merge(message.tree, select(client.kept, HEAD)))

    def _individual(self) -> Slot:
        shared = self.lora.slot(SHARED)
        return Slot(INDIVIDUAL, self.client_rank, shared.scaling * self.client_rank)

    def _plan(self) -> Plan:
        slots = (self.lora.slot(SHARED), self._individual())
        return Plan(slots, Sum((1.0, 1.0)), self.lora.dropout)
