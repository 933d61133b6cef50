"""A federation in Flower's simulation: clients as Ray's tasks, for a cluster of GPUs.

Each of Ray's processes loads the base model once and serves whichever client it is given. States
lie in the run's folder, which all processes must see.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedalt.core.files import atomic_write, make_private_folder
from fedalt.engine.firewall import Screening
from fedalt.federation.agreement import (
    FILE,
    Agreement,
    read_agreement,
    require_apart,
    write_agreement,
)
from fedalt.federation.client_folder import client_in
from fedalt.federation.owner_messages import Say
from fedalt.federation.rules import Rules
from fedalt.federation.server_folder import open_server
from fedalt.federation.transport import Lost
from fedalt.flower.message_content import bytes_of, content_of
from fedalt.flower.processes import QUIET
from fedalt.runs.folder import StoreError, locked
from fedalt.runs.kept_settings import require_settings
from fedalt.runs.settings import Settings, read_settings, to_toml
from fedalt.runs.setup import Prepared, prepare
from fedalt.runs.together import require_seen

_PAUSE: Final = 0.05  # seconds between two looks
_RAY: Final = {**QUIET, "RAY_USAGE_STATS_ENABLED": "0"}


class _ActorDiedError(StoreError):
    """A process of Ray's has died; Ray does not start it again, and would go on with fewer."""


def simulate(settings: Settings, folder: Path, say: Say, *, gpus: float = 0.0) -> None:
    """Run all clients of a data folder, each on a processor core and `gpus` of a GPU.

    Goes on where the folder stands. Raises StoreError where a process has died: the same command
    goes on from there.
    """
    require_apart(settings)
    require_seen(settings.privacy)
    os.environ.update(_RAY)
    make_private_folder(folder)
    with locked(folder):
        settings_file = folder / "settings.toml"
        if settings_file.exists():
            require_settings(folder, settings)
        terms = _terms(settings, folder)
        if not settings_file.exists():
            atomic_write(settings_file, to_toml(settings).encode())
        server, client, failed = ServerApp(), ClientApp(), []

        @server.main()
        def serve(grid: Grid, _: Context) -> None:
            try:
                _serve(terms, folder, grid, say)
            except StoreError as error:
                failed.append(error)

        client.train()(_answer_in(folder.absolute()))
        client.query()(_say_who)
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=len(terms.clients),
            backend_config={
                "client_resources": resources,
                "init_args": {"include_dashboard": False, "log_to_driver": False},
            },
        )
    if failed:
        raise failed[0]


def _terms(settings: Settings, folder: Path) -> Agreement:
    file = folder / FILE
    if not file.exists():
        prepared = prepare(settings)
        write_agreement(
            folder, folder.name, prepared.task.clients, prepared.task.labels, prepared.parts
        )
    return read_agreement(file)


def _serve(terms: Agreement, folder: Path, grid: Any, say: Say) -> None:
    transport = _SimulatedNodes(grid, _nodes_by_client(grid, terms))
    rounds = terms.settings.rounds
    screening = Screening(terms.settings.firewall, rounds.robust, rounds.trim)
    with locked(folder / "run"):  # as `fedalt leave` does
        open_server(terms, folder / "run", transport, Rules(), screening, say).to_the_end()


def _nodes_by_client(grid: Any, terms: Agreement) -> dict[str, int]:
    """Each client's node: the numbers of nodes are random, their partitions are not."""
    while len(nodes := list(grid.get_node_ids())) < len(terms.clients):
        time.sleep(_PAUSE)  # Flower makes them beside us
    calls = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    nodes_by_client = {}
    for reply in grid.send_and_receive(calls):
        if reply.has_error():
            raise _ActorDiedError(f"a process of Ray's has failed: {reply.error.reason}")
        place = int(bytes_of(reply.content))
        nodes_by_client[terms.clients[place]] = reply.metadata.src_node_id
    return nodes_by_client


@dataclass
class _SimulatedNodes:
    """Flower's simulated nodes as a transport: always online, and dead for good if one is lost."""

    grid: Any  # flwr.serverapp.Grid
    nodes: Mapping[str, int]
    _open: dict[str, str] = field(default_factory=dict)  # message to client

    def online(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self.nodes)

    def send(self, calls: Iterable[tuple[str, bytes]]) -> None:
        """Leave calls for clients."""
        for client_id, data in calls:
            call = Message(content_of(data), self.nodes[client_id], MessageType.TRAIN)
            (name,) = self.grid.push_messages([call])
            self._open[name] = client_id

    def receive(self) -> list[tuple[str, bytes | Lost]]:
        """The answers since the last look. Raises StoreError where a process of Ray's has died."""
        answers: list[tuple[str, bytes | Lost]] = []
        for reply in self.grid.pull_messages(list(self._open)):
            client_id = self._open.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                raise _ActorDiedError(
                    f"client {client_id!r}: its process has failed ({reply.error.reason}). Ray "
                    "would go on without those that it served; nothing is lost, the same command "
                    "goes on from here"
                )
            answers.append((client_id, bytes_of(reply.content)))
        if not answers:
            time.sleep(_PAUSE)
        return answers


def _answer_in(folder: Path) -> Any:
    """Answers calls; what it needs of this process it finds in the folder."""

    def answer(message: Message, context: Context) -> Message:
        terms, prepared = _loaded(folder)
        client_id = terms.clients[int(context.node_config["partition-id"])]
        place = folder / "members" / client_id
        make_private_folder(place)
        with locked(place):
            reply = client_in(place, terms, client_id, prepared).answer(bytes_of(message.content))
        return Message(content_of(reply), reply_to=message)

    return answer


def _say_who(message: Message, context: Context) -> Message:
    place = str(context.node_config["partition-id"]).encode()
    return Message(content_of(place), reply_to=message)


@cache
def _loaded(folder: Path) -> tuple[Agreement, Prepared]:
    """The base model and the data, once for each of Ray's processes."""
    return read_agreement(folder / FILE), prepare(read_settings(folder / "settings.toml"))
