"""FedALT-select: an individual adapter at full strength, plus the products of similar clients.

Our own composition after FedALT (arXiv 2503.11880), not a published method. Client k trains A_k and
B_k against a frozen rest of world R_k that is its own, chosen by the server, on every site:

    y    = W0 x + s B_k A_k x + g s R_k x                        g fixed; gradient flows through R_k
    S_kj = mean over sites of <B_k A_k, B_j A_j> / (|B_k A_k| |B_j A_j|),
           over rounds  S <- m S + (1 - m) S_new                       <,> by traces of r x r blocks
    w_kj = trust_k (S_kj - tau)+^p / sum_i (S_ki - tau)+^p
           trust_k = (max_j S_kj - tau) / width, cut to [0, 1]
    R_k  = sum_j w_kj B_j A_j, an exact sum of products, cut to its r strongest directions

1. Silence is an answer: who is like nobody has trust 0, gets nothing, and trains plain LoRA alone.
2. A client serves the pair it has trained, not its adapter with the next rest of world.
3. Nobody listens in the first `alone` rounds, when all adapters still point where the common start
   points. What is passed on are individual adapters: whole models would come back as echoes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedalt.adapters.plan import HEAD, Plan, Sum, names_of, single
from fedalt.adapters.start import Start
from fedalt.core.tree import Tree, merge, select
from fedalt.methods.checks import check
from fedalt.methods.contract import Deploy, Ledger, Local, MemoryLedger, Message, Serving
from fedalt.methods.defaults import at_once
from fedalt.methods.kin import Similar, kin_weights, similarities, sum_of_products
from fedalt.methods.lora import Lora
from fedalt.training.orders import Fit, Fitted

INDIVIDUAL = "individual"
REST_OF_WORLD = "rest_of_world"


@dataclass(frozen=True)
class Server:
    """How many rounds are done, S by client and other client, each R_k there is, the uploads."""

    TAG: ClassVar = "fedalt-select/server"

    rounds: int = 0
    similar: Similar = field(default_factory=dict)
    rows: Mapping[str, Tree] = field(default_factory=dict)
    latest: Ledger = field(default_factory=MemoryLedger)


@dataclass(frozen=True)
class Client:
    """The client's adapter, a classifier's head, and the R_k both were trained against, if any."""

    TAG: ClassVar = "fedalt-select/client"

    individual: Tree
    head: Tree
    row: Tree = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FedALTSelect:
    """The method; clients that sit out a round are heard with their latest upload.

    `tau` in [-1, 1) is the similarity from which on a client is heard, tau + `width` the one from
    which on the best of the heard gets full trust; `power` >= 0 is p: 0 weighs all the heard alike.
    `memory` in [0, 1) is m. `alone` >= 1 rounds are plain LoRA. `gain` >= 0 is g. The defaults are
    those of the one run that has been made (see the log of experiments).
    """

    lora: Lora = Lora()
    tau: float = 0.2
    width: float = 0.35
    power: float = 1.0
    memory: float = 0.5
    alone: int = 1
    gain: float = 1.0

    server_state = Server
    client_state = Client
    averages = False

    def __post_init__(self) -> None:
        check(self, tau="[-1, 1)", memory="[0, 1)", alone="[1, inf)")
        check(self, width="(0, inf)", power="[0, inf)", gain="[0, inf)")

    def init_server(self, start: Start) -> Server:
        """Nobody has been heard yet."""
        return Server()

    def init_client(self, start: Start, client_id: str) -> Client:
        """A drawn, the same for everyone, B zero."""
        return Client(start.adapter(self.lora.slot(INDIVIDUAL)), start.head())

    def broadcast(self, server: Server, client_id: str) -> Message:
        """The client's own rest of world; nothing where there is none."""
        return Message(server.rows.get(client_id, {}))

    def local(self, client: Client, message: Message) -> Local[Client]:
        """Train the individual adapter against the frozen rest of world, and send it back."""
        tree = merge(client.individual, message.tree, client.head)
        trained = names_of(tree, INDIVIDUAL, HEAD)
        fitted: Fitted = yield Fit(self._plan(message.tree), tree, trained)
        individual = select(fitted.tree, INDIVIDUAL)
        return Client(individual, select(fitted.tree, HEAD), message.tree), Message(individual)

    def aggregate(self, server: Server, replies: Iterable[tuple[str, Message]]) -> Server:
        """Compare the latest uploads, and sum up for every client those of its kin."""
        latest = server.latest
        for client_id, upload in replies:
            latest = latest.put(client_id, upload)
        adapters = {client: latest[client].tree for client in latest.clients()}
        similar = similarities(adapters, server.similar, self.memory)
        return self._heard(Server(server.rounds + 1, similar, latest=latest), adapters)

    def deploy(self, client: Client, message: Message) -> Deploy:
        """The individual adapter with the rest of world that it was trained against."""
        tree = merge(client.individual, client.row, client.head)
        return at_once(Serving(self._plan(client.row), tree))

    def shared(self, client: Client, message: Message) -> Serving | None:
        """That rest of world alone, if there is one."""
        plan = single(self.lora.slot(REST_OF_WORLD), self.lora.dropout)
        return Serving(plan, merge(client.row, client.head)) if client.row else None

    def without(self, server: Server, client_id: str) -> Server:
        """All rests of world once more, without this client's upload."""
        latest = server.latest.without(client_id)
        similar = {
            client: {other: s for other, s in row.items() if other != client_id}
            for client, row in server.similar.items()
            if client != client_id
        }
        adapters = {client: latest[client].tree for client in similar}
        return self._heard(replace(server, similar=similar, latest=latest), adapters)

    def _heard(self, server: Server, adapters: Mapping[str, Tree]) -> Server:
        """The server with everybody's rest of world, made of these adapters."""
        rows: dict[str, Tree] = {}
        for client, row in server.similar.items() if server.rounds >= self.alone else ():
            weights = kin_weights(row, tau=self.tau, width=self.width, power=self.power)
            if weights:
                rows[client] = sum_of_products(adapters, weights, REST_OF_WORLD, self.lora.rank)
        return replace(server, rows=rows)

    def _plan(self, row: Tree) -> Plan:
        slot = self.lora.slot(INDIVIDUAL)
        if not row:
            return single(slot, self.lora.dropout)
        slots = (slot, self.lora.slot(REST_OF_WORLD))
        return Plan(slots, Sum((1.0, self.gain)), self.lora.dropout)
