"""Flower's grid as a federation's transport: node ids become clients by their registered keys."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from flwr.app import Error, Message, MessageType

from fedalt.federation.transport import Lost
from fedalt.flower.client_keys import key_text
from fedalt.flower.message_content import bytes_of, content_of

_PAUSE: Final = 0.2  # seconds between two looks
_LOOK_AT_NODES: Final = 1.0
_AT_ONCE: Final = 8  # answers in memory; who receives them puts them on disk


@dataclass
class GridTransport:
    """Calls clients over a grid. `clients` tells who is behind which public key, now.

    Of an answer of more than `most` bytes only the beginning is received, one byte more than that.
    """

    grid: Any  # flwr.serverapp.Grid, whose get_nodes the interface does not declare
    clients: Callable[[], Mapping[str, str]]
    most: int
    _nodes: dict[str, int] = field(default_factory=dict)
    _looked: float = 0.0
    _open: dict[str, tuple[str, float]] = field(default_factory=dict)  # message: client, sent when
    _lost: list[str] = field(default_factory=list)

    def online(self) -> frozenset[str]:
        """The clients whose nodes are connected."""
        if time.monotonic() - self._looked > _LOOK_AT_NODES:
            nodes = [node for node in self.grid.get_nodes() if node.status == "online"]
            clients = self.clients()
            known = [(clients.get(key_text(node.public_key)), node) for node in nodes]
            self._nodes = {client_id: node.node_id for client_id, node in known if client_id}
            for client_id, node in known:
                self._give_up(client_id, datetime.fromisoformat(node.last_activated_at))
            self._looked = time.monotonic()
        return frozenset(self._nodes)

    def _give_up(self, client_id: str | None, connected: datetime) -> None:
        """Count calls as lost that a client was sent before its present connection.

        Flower hands a call out once, and keeps waiting for the answer of who is online again.
        """
        for name, (called, sent) in list(self._open.items()):
            if called == client_id and sent < connected.timestamp():
                del self._open[name]
                self._lost.append(called)

    def send(self, calls: Iterable[tuple[str, bytes]]) -> None:
        """Leave calls for clients' nodes, one by one: the first trains while the next is sent."""
        for client_id, data in calls:
            node = self._nodes[client_id]
            message = Message(content_of(data), dst_node_id=node, message_type=MessageType.TRAIN)
            (name,) = self.grid.push_messages([message])
            if name is None:  # the node is gone; it is called when it is back
                self._lost.append(client_id)
            else:
                self._open[name] = client_id, time.time()

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        """Answers, and calls that Flower has given up."""
        answers: list[tuple[str, bytes | Lost]] = []
        waiting = list(self._open)
        for first in range(0, len(waiting), _AT_ONCE):
            names = waiting[first : first + _AT_ONCE]
            pulled = self.grid.pull_messages(names)
            replies = {reply.metadata.reply_to_message_id: reply for reply in pulled}
            for name in filter(replies.__contains__, names):  # a client's own in their order
                client_id, _ = self._open.pop(name)
                answers.append((client_id, _content(replies[name], self.most)))
            if answers:
                break
        lost = Lost("it was away, and its call with it")
        answers += [(client_id, lost) for client_id in self._lost]
        self._lost.clear()
        if any(isinstance(answer, Lost) for _, answer in answers):
            self._looked = 0.0  # whoever has lost it is not there any more
        if not any(isinstance(answer, bytes) for _, answer in answers):
            time.sleep(_PAUSE)
        return answers


def _content(reply: Message, most: int) -> bytes | Lost:
    if reply.has_error():
        error: Error = reply.error
        return Lost(f"its call is lost (Flower's code {error.code}: {error.reason})")
    try:
        return bytes_of(reply.content, most)
    except ValueError as error_:
        return str(error_).encode()  # not an answer, which the host will find out and keep
