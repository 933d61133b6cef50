"""Local only: each client trains a LoRA of its own and never talks; the yardstick of every table.

T rounds of E local epochs with a new optimiser and schedule each, so that steps, learning rates
and batches are those of the federated methods it is compared with.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedalt.adapters.plan import HEAD, Plan, names_of, single
from fedalt.adapters.start import Start
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.lora import Lora
from fedalt.training.orders import Fit, Fitted

INDIVIDUAL = "individual"


@dataclass(frozen=True)
class Server:
    """Nothing: no one uploads."""

    TAG: ClassVar = "local/server"


@dataclass(frozen=True)
class Client:
    """The client's adapter and, for a classifier, its head."""

    TAG: ClassVar = "local/client"

    individual: Tree
    head: Tree


@dataclass(frozen=True, kw_only=True)
class LocalOnly:
    """The method; its messages are empty both ways."""

    lora: Lora = Lora()

    server_state = Server
    client_state = Client
    averages = False

    def init_server(self, start: Start) -> Server:  # noqa: ARG002
        """There is nothing to keep."""
        return Server()

    def init_client(self, start: Start, client_id: str) -> Client:  # noqa: ARG002
        """The same first A as in every other method, B zero."""
        return Client(start.adapter(self.lora.slot(INDIVIDUAL)), start.head())

    def broadcast(self, server: Server, client_id: str) -> Message:  # noqa: ARG002
        """Nothing."""
        return Message({})

    def local(self, client: Client, message: Message) -> Local[Client]:  # noqa: ARG002
        """Go on training the client's own adapter."""
        tree = merge(client.individual, client.head)
        fitted: Fitted = yield Fit(self._plan(), tree, names_of(tree, INDIVIDUAL, HEAD))
        after = Client(select(fitted.tree, INDIVIDUAL), select(fitted.tree, HEAD))
        return after, Message({})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Read the empty replies to their end, so that the engine runs every client."""
        for _ in replies:
            pass
        return server

    def deploy(self, client: Client, message: Message) -> Deploy:  # noqa: ARG002
        """The client's adapter."""
        return Serving(self._plan(), merge(client.individual, client.head))
        yield  # deploy is a generator for methods that train before they serve

    def shared(self, client: Client, message: Message) -> Serving | None:  # noqa: ARG002
        """Nothing is shared."""
        return None

    def without(self, server: Server, client_id: str) -> Server:  # noqa: ARG002
        """Nobody has put in anything."""
        return server

    def _plan(self) -> Plan:
        return single(self.lora.slot(INDIVIDUAL), self.lora.dropout)
