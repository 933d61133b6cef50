"""Flower's grid as a federation's transport: node ids become clients by their registered keys."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import httpx
from flwr.app import Error, Message, MessageType

from fedalt.federation.transport import Lost
from fedalt.flower.client_keys import key_text
from fedalt.flower.message_content import bytes_of, content_of

_PAUSE: Final = 0.2  # seconds between two looks
_LOOK_AT_NODES: Final = 1.0
_AT_ONCE: Final = 8  # answers in memory, whole or coming; who receives them puts them on disk
# Seconds after which an answer that comes waits for its sender: what Flower's server has as a whole
# is here sooner, over loopback.
_IN_PART: Final = 10.0
# Answers that are waited for. A connection that breaks off leaves one, for three minutes, and
# Flower keeps its client out for one: so three may still be there when the next one comes.
_PER_CLIENT: Final = 4
# Those of 128 clients; a thread is begun when it is needed, and others' answers wait for one.
_THREADS: Final = 4 * 128
_LONGEST: Final = 600  # characters of an error, which may quote what a client has sent


@dataclass(frozen=True)
class _Pull:
    """An answer that is being fetched, from Flower's server as far as it has come there."""

    client_id: str
    began: float
    answer: "Future[bytes | Lost | None]"


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
    _pulls: dict[str, _Pull] = field(default_factory=dict)  # by message
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_THREADS))

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
        answers = self._come()
        lost = Lost("it was away, and its call with it")
        answers += [(client_id, lost) for client_id in self._lost]
        self._lost.clear()
        if any(isinstance(answer, Lost) for _, answer in answers):
            self._looked = 0.0  # whoever has lost it is not there any more
        if not any(isinstance(answer, bytes) for _, answer in answers):
            time.sleep(_PAUSE)
        return answers

    def _come(self) -> list[tuple[str, bytes | Lost]]:
        """The answers that are here as a whole, of each client to its oldest call.

        Flower waits for the rest of an answer that has come in part. Threads wait with it, and
        those that have to wait take nobody's turn: uploads that never end, however many, hold up
        nobody else. Flower's server has all that has come in memory, so this at most doubles it.
        """
        oldest = {client_id: name for name, (client_id, _) in reversed(self._open.items())}
        pulled = Counter(pull.client_id for pull in self._pulls.values())
        waiting = [
            (client_id, name)
            for client_id, name in oldest.items()
            if name not in self._pulls and pulled[client_id] < _PER_CLIENT
        ]
        answers: list[tuple[str, bytes | Lost]] = []
        while waiting or self._pulls:
            room = max(_AT_ONCE - self._coming() - len(answers), 0)
            now, waiting = waiting[:room], waiting[room:]
            for client_id, name in now:
                future = self._pool.submit(self._pulled, name)
                self._pulls[name] = _Pull(client_id, time.monotonic(), future)
            futures = [pull.answer for pull in self._pulls.values()]
            done, _ = wait(futures, _PAUSE, FIRST_COMPLETED)
            if not done:
                break
            answers += self._finished()
        return answers

    def _coming(self) -> int:
        """How many answers are on their way here, and do not wait for their senders."""
        now = time.monotonic()
        return sum(now - pull.began < _IN_PART for pull in self._pulls.values())

    def _finished(self) -> Iterator[tuple[str, bytes | Lost]]:
        """The answers of pulls that are over; not of a call that was given up meanwhile."""
        for name in [name for name, pull in self._pulls.items() if pull.answer.done()]:
            answer = self._pulls.pop(name).answer.result()
            if answer is not None and name in self._open:
                client_id, _ = self._open.pop(name)
                yield client_id, answer

    def _pulled(self, name: str) -> bytes | Lost | None:
        """The answer to one call, if it is there; None if it is not.

        Calls are looked for one by one: Flower makes objects of what a client has chosen, and where
        it cannot, that is this client's answer and nobody else's. What an answer says of the call
        that it is to does not count, for the same reason.
        """
        try:
            pulled = list(self.grid.pull_messages([name]))
            return _content(pulled[0], self.most) if pulled else None
        except httpx.HTTPError:  # the connection's, and no answer
            raise
        except Exception as error:  # no answer, which the host will find out and keep
            text = f"{type(error).__name__}: {error}"[:_LONGEST]
            return text.encode(errors="backslashreplace")


def _content(reply: Message, most: int) -> bytes | Lost:
    if reply.has_error():
        error: Error = reply.error
        return Lost(f"its call is lost (Flower's code {error.code}: {error.reason})")
    return bytes_of(reply.content, most)
