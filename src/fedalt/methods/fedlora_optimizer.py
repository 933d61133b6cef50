"""FedLoRA-Optimizer: shared directions of A, personal magnitudes of B.

Zhao, Zhu, Zhang, Chen, Guo: "FedLoRA-Optimizer: Federated LoRA Fine-Tuning with Global and Local
Optimization in Heterogeneous Data Scenarios", arXiv 2510.11274. Each rank row k of A and each
column k of B is a length times a direction:

    A = diag(a) U,  |U[k]| = 1        B = V diag(b),  |V[:, k]| = 1        s B A = s V diag(b a) U

    local stage   a round    train A and B;  a, U, b, V <- their means, U and V to length 1 again
    global stage  G rounds   train U alone, bring it to length 1;  U <- its mean, to length 1 again
    to serve      a client   descends on b alone:  loss + l2 / 2 |b - its mean|^2

"Alone" leaves a classifier's head out, which the stages before have trained as every method does.

This is a RECONSTRUCTION. Known are the decomposition, that A's directions are refined for all and
then B's magnitudes for each client, and this order; not known are the axes, the losses, what the
global stage trains on (here: the clients' data, federated), the numbers of rounds and the rates.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, merge, replace, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import kept_in_averages
from fedalt.methods.directions import DIRECTION, LENGTH, Axis, compose, decompose, normalise
from fedalt.methods.lora import Lora, Weighting, weight_of
from fedalt.methods.mean import weighted_mean
from fedalt.training.orders import Fit, Fitted

SHARED = "shared"


@dataclass(frozen=True)
class Server:
    """The parts a, U, b, V that all share, and how many rounds are done."""

    TAG: ClassVar = "fedlora-optimizer/server"

    parts: Tree
    rounds: int = 0


@dataclass(frozen=True)
class Client:
    """Only a classifier's head is kept: a client's b follows from the shared parts and its data."""

    TAG: ClassVar = "fedlora-optimizer/client"

    head: Tree


@dataclass(frozen=True, kw_only=True)
class FedLoRAOptimizer:
    """The method; clients that sit out a round do not count in its mean.

    `global_rounds` G >= 0 follow each round of the local stage. Before it serves, a client trains
    its b, and nothing else, for `personal_epochs` at `personal_rate` times the run's learning rate,
    with `l2` >= 0.
    `a_axis`: the lengths of A are those of its rank rows, or those of its columns. All of these
    are our choice.
    """

    lora: Lora = Lora()
    weighting: Weighting = "uniform"
    global_rounds: int = 1
    personal_epochs: int = 1
    personal_rate: float = 10.0
    l2: float = 0.01
    a_axis: Axis = "rank"

    server_state = Server
    client_state = Client
    averages = True
    without = kept_in_averages

    def __post_init__(self) -> None:
        check(self, global_rounds="[0, inf)", personal_epochs="[0, inf)", l2="[0, inf)")
        check(self, personal_rate="(0, inf)")

    @property
    def renewed(self) -> bool:
        """Whether there are two stages, of which each trains something else."""
        return self.global_rounds > 0

    def init_server(self, init: Initializer) -> Server:
        return Server(decompose(init.adapter(self.lora.slot(SHARED)), self.a_axis))

    def init_client(self, init: Initializer, client_id: str) -> Client:
        return Client(init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """All parts and the stage of this round, the same for every client."""
        stage = "global" if server.rounds % (1 + self.global_rounds) else "local"
        return Message(server.parts, {"stage": stage})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train A and B and send their parts back, or U alone and send that, of length 1 again."""
        if message.facts["stage"] == "local":
            tree = self._composed(merge(message.tree, client.head))
            fitted: Fitted = yield Fit(self.lora.plan(SHARED), tree, frozenset(tree))
            after = decompose(select(fitted.tree, SHARED), self.a_axis)
        else:
            tree = merge(message.tree, client.head)
            trained = names_of(tree, HEAD) | _part(tree, DIRECTION["A"]).keys()
            fitted = yield Fit(self.lora.plan(SHARED), tree, trained, compose=self._composed)
            after = normalise(_part(fitted.tree, DIRECTION["A"]), message.tree, self.a_axis)
        upload = Message(after, {"weight": weight_of(fitted, self.weighting)})
        return Client(select(fitted.tree, HEAD)), upload

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """The mean of every part; directions that cancel each other stay what they were."""
        parts = normalise(weighted_mean(replies), server.parts, self.a_axis)
        return Server(replace(server.parts, parts), server.rounds + 1)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The shared parts, with the client's own b, which alone is trained before it serves.

        A head that had further steps, at the personal rate, would be most of what is compared.
        """
        tree = merge(message.tree, client.head)
        mean = _part(tree, LENGTH["B"])

        def far_from_the_mean(tree: Tree) -> Tensor:
            gaps = [(tree[name] - mean[name].to(tree[name])).square().sum() for name in mean]
            return self.l2 / 2 * torch.stack(gaps).sum()

        fitted: Fitted = yield Fit(
            self.lora.plan(SHARED),
            tree,
            frozenset(mean),
            epochs=self.personal_epochs,
            rate=self.personal_rate,
            compose=self._composed,
            penalty=far_from_the_mean,
        )
        return Serving(self.lora.plan(SHARED), self._composed(fitted.tree))

    def shared(self, client: Client, message: Message) -> Serving:
        """What everyone would serve without a b of its own."""
        tree = merge(message.tree, client.head)
        return Serving(self.lora.plan(SHARED), self._composed(tree))

    def _composed(self, tree: Tree) -> Tree:
        """The tree that is bound: A and B of their parts, and the head."""
        return merge(compose(select(tree, SHARED), self.a_axis), select(tree, HEAD))


def _part(tree: Tree, part: str) -> Tree:
    """The tensors of one part."""
    return {name: tree[name] for name in tree if name[1:] == (SHARED, part)}
