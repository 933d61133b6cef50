"""Local only: each client trains a LoRA of its own and never talks; the baseline of every table.

T rounds of E local epochs with a new optimiser and schedule each, so that steps, learning rates
and batches are those of the federated methods it is compared with.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, names_of
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.contract import Deploy, Local, Message, Serving
from fedalt.methods.defaults import at_once, nothing_shared
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
    shared = nothing_shared

    def init_server(self, init: Initializer) -> Server:
        return Server()

    def init_client(self, init: Initializer, client_id: str) -> Client:
        """The same first A as in every other method, B zero."""
        return Client(init.adapter(self.lora.slot(INDIVIDUAL)), init.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        return Message({})

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Go on training the client's own adapter."""
        tree = merge(client.individual, client.head)
        fitted: Fitted = yield Fit(
            self.lora.plan(INDIVIDUAL), tree, names_of(tree, INDIVIDUAL, HEAD)
        )
        after = Client(select(fitted.tree, INDIVIDUAL), select(fitted.tree, HEAD))
        return after, Message({})

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Read the empty replies to their end, so that the engine runs every client."""
        for _ in replies:
            pass
        return server

    def deploy(self, client: Client, message: Message) -> Deploy:
        return at_once(Serving(self.lora.plan(INDIVIDUAL), merge(client.individual, client.head)))

    def without(self, server: Server, client_id: str) -> Server:
        """Nobody has put in anything."""
        return server
