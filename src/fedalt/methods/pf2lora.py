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

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedalt.adapters.plan import HEAD, Plan, Slot, Sum, single
from fedalt.adapters.start import Start
from fedalt.core.tree import Name, Tree, merge, select
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import at_once, kept_in_averages
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Fit, Fitted, Stepped

SHARED = "shared"
INDIVIDUAL = "individual"

Gradient = Literal["exact", "finite_difference", "first_order"]


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


@dataclass(frozen=True)
class Unrolled:
    """One step on both levels: the individual adapter moves, the shared one gets a hypergradient.

    `rate` is the lower level's learning rate, of C and of D times `scaling`, which is the s of the
    individual adapter. A classifier's head is part of the upper level.
    "exact" differentiates twice, which fused attention kernels cannot; "finite_difference" takes
    the difference of two first derivatives instead; "first_order" leaves the second term out.
    """

    rate: float
    gradient: Gradient
    scaling: float = 1.0
    moves = INDIVIDUAL

    def __call__(
        self, tree: Tree, train: Sequence[Name], loss: Callable[[Tree, int], Tensor]
    ) -> Stepped:
        """Two forward and backward passes; "exact" goes back twice, differences pass four times."""
        lower = [name for name in train if name.slot == self.moves]
        upper = [name for name in train if name.slot != self.moves]
        exact = self.gradient == "exact"
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            first = loss(tree, 0)
        slope = _gradients(first, tree, lower, keep=exact)
        rates = {name: self._rate(name) for name in lower}
        moved = {name: (tree[name] - rates[name] * slope[name]).detach() for name in lower}
        for tensor in moved.values():
            tensor.requires_grad_()
        after = {**tree, **moved}
        both = _gradients(loss(after, 1), after, [*upper, *lower])
        h = {name: both[name] for name in upper}
        v = {name: rates[name] * both[name].detach() for name in lower}
        if exact:
            along = torch.stack([(slope[name] * v[name]).sum() for name in lower]).sum()
            crossed = _gradients(along, tree, upper)
        elif self.gradient == "finite_difference":
            crossed = self._difference(tree, upper, v, loss)
        else:
            return Stepped(first.detach(), h, moved)
        return Stepped(first.detach(), {n: h[n] - crossed[n] for n in upper}, moved)

    def _rate(self, name: Name) -> float:
        """What a gradient is multiplied with; that of D holds one s, and D's effect another."""
        return self.rate / self.scaling**2 if name.factor == "B" else self.rate

    def _difference(
        self, tree: Tree, upper: Sequence[Name], v: Tree, loss: Callable[[Tree, int], Tensor]
    ) -> Tree:
        """(grad_x f(x, y + e v) - grad_x f(x, y - e v)) / 2e, e so small that e v is 0.01 long."""
        length = torch.stack([tensor.square().sum() for tensor in v.values()]).sum().sqrt()
        if not length:
            return {name: torch.zeros_like(tree[name]) for name in upper}
        e = 0.01 / length
        ahead, behind = (
            _gradients(
                loss({**tree, **{n: (tree[n] + sign * e * v[n]).detach() for n in v}}, 0),
                tree,
                upper,
            )
            for sign in (1, -1)
        )
        return {name: (ahead[name] - behind[name]) / (2 * e) for name in upper}


def _gradients(value: Tensor, tree: Tree, names: Sequence[Name], *, keep: bool = False) -> Tree:
    """The gradient for every name; 0 where the value does not depend on it."""
    tensors = [tree[name] for name in names]
    found = torch.autograd.grad(
        value, tensors, create_graph=keep, retain_graph=True, materialize_grads=True
    )
    return dict(zip(names, found, strict=True))


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
    inner_lr: float = 1.0
    hypergradient: Gradient = "exact"

    server_state = Server
    client_state = Client
    averages = True
    without = kept_in_averages

    def __post_init__(self) -> None:
        if self.client_rank < 1:
            raise ValueError(f"client_rank={self.client_rank}, but a rank is at least 1")
        if not self.inner_lr >= 0:
            raise ValueError(f"inner_lr={self.inner_lr}, but it cannot be negative")

    def init_server(self, start: Start) -> Server:
        """A drawn, B zero."""
        return Server(start.adapter(self.lora.slot(SHARED)))

    def init_client(self, start: Start, client_id: str) -> Client:
        """C drawn apart from the shared A but the same for everyone, D zero."""
        return Client(merge(start.adapter(self._individual(), apart=True), start.head()))

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The averaged adapter, the same for every client."""
        return Message(server.adapter)

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Both levels descend together; only the shared adapter is sent back."""
        tree = merge(message.tree, client.kept)
        step = Unrolled(self.inner_lr, self.hypergradient, self._individual().scaling)
        fitted: Fitted = yield Fit(self._plan(), tree, frozenset(tree), step=step)
        upload = Message(select(fitted.tree, SHARED), {"weight": weight_of(fitted, self.weighting)})
        return Client(select(fitted.tree, INDIVIDUAL, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The weighted mean of the cohort's shared adapters."""
        mean = weighted_mean(replies)
        return Server(mean) if mean else server

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
