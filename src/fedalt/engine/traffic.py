"""Messages in fewer bytes: changes of what the receiver has already, in few bits a number.

Upload. u is a client's upload, r what the server read of its uploads so far, tensor by tensor:

    sent: q = Q(u - r)        read by both: r <- r + q

so what q lacks, u - r, is part of the next change, and an upload that is rejected leaves r alone on
both sides. Before the first, r is what the client would upload if training moved nothing.

Download. T is what the server would send, p what clients had of it after the round before:

    sent: q = Q(T - p)        read by all: p <- p + q

p depends on the server's states alone: whoever has missed one is sent p itself, in float32. Every
change names its reference by a digest, so that nobody adds it to anything else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import hypot
from statistics import median_low
from typing import Any, ClassVar, Final

import torch

from fedalt.adapters.initializer import Initializer
from fedalt.core.codec import CodecError, read
from fedalt.core.tree import Tree, cast
from fedalt.core.upload_settings import Traffic as Traffic
from fedalt.engine.changes import (
    Change,
    Known,
    ReferenceLackedError,
    Sent,
    change_of,
    has,
    message_of,
)
from fedalt.engine.dry_run import Form, play
from fedalt.engine.firewall import Refused, check_shapes
from fedalt.engine.states import States, server_of
from fedalt.engine.uploads import Spooled
from fedalt.methods.contract import AnyMethod, Message

# How many times the usual norm an upload may have where readers subtract from a sum that is sent
# rounded: its own part of it must leave room for the others'.
ROOM: Final[Mapping[str, float]] = {"float32": 2.0**14, "bf16": 64.0, "int8": 64.0, "int4": 8.0}
_CHANGES: Final = ("bf16", "int8", "int4")  # of what clients have, the others are whole messages


@dataclass(frozen=True)
class Published:
    """What clients have of a server's state, and the change that made it of the one before.

    `apart`: there is one for each client, and this one stands for none.
    """

    TAG: ClassVar = "traffic/published"

    known: Known
    change: Change | None = None
    apart: bool = False


@dataclass(frozen=True)
class Digests:
    """Digests of what each client was sent last, and of what it is known to have uploaded."""

    TAG: ClassVar = "traffic/digests"

    down: Mapping[str, str] = field(default_factory=dict)
    up: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Coding:
    """How the messages of one arm become shorter; `clients` are all that may take part."""

    method: AnyMethod
    init: Initializer
    settings: Traffic = field(default_factory=Traffic)
    clients: Sequence[str] = ()

    def send(
        self, states: States, client_id: str, upload: Message, expected: str | None = None
    ) -> Sent:
        """A client's upload as it is sent, in full if the server expects another reference."""
        kind = self.settings.upload
        if kind == "float32" or not upload.tree:
            return upload
        key = f"clients/{client_id}/sent"
        known = self._uploaded(states, key, client_id)
        if expected not in (None, known.digest):
            states.put(key, Known.of({**known.tree, **upload.tree}))
            return upload
        change = change_of(upload, known, kind, self.init.seed, "upload", client_id)
        states.put(key, Known.of({**known.tree, **message_of(change, known).tree}))
        return change

    def open(self, states: States, client_id: str, sent: Sent, forms: Sequence[Form]) -> Message:
        """An upload as the server reads it. Raises Refused for a change that it cannot read."""
        if isinstance(sent, Message):
            return sent
        if sent.kind != self.settings.upload:
            raise Refused(f"the upload is sent in {sent.kind}, expected {self.settings.upload}")
        known = self._uploaded(states, f"server/received/{client_id}", client_id)
        try:
            return message_of(sent, known, lambda shapes: check_shapes(shapes, forms))
        except (CodecError, ReferenceLackedError) as error:
            raise Refused(f"the upload cannot be read: {error}") from error

    def expected(self, digests: Digests, client_id: str) -> str:
        """The digest of what the server has of a client's uploads, "" where none is needed."""
        if self.settings.upload == "float32":
            return ""
        return digests.up.get(client_id) or self._first(client_id).digest

    def _uploaded(self, states: States, key: str, client_id: str) -> Known:
        return states.get(key, Known) or self._first(client_id)

    def _first(self, client_id: str) -> Known:
        """What a client would upload in the first round if training moved nothing."""
        method, init = self.method, self.init
        message = method.broadcast(method.init_server(init), client_id)
        steps = method.local(method.init_client(init, client_id), message)
        return Known.of(play(steps, init, examples=1)[1].tree)

    def drowning(self, server: Any, uploads: Mapping[str, Spooled]) -> dict[str, str]:
        """Whose upload is too large for the others' numbers to survive in what is sent, and why.

        A method that sends float64 sends a sum that its readers subtract from. An upload is in it
        times its weight.
        """
        room = ROOM.get(self.settings.download)
        sizes = ((who, upload.size) for who, upload in uploads.items())
        parts = {
            who: size.norm * (1.0 if size.weight is None else size.weight)
            for who, size in sizes
            if size.norm
        }
        if room is None or len(parts) < 2 or not self._sends_sums(server, min(parts)):
            return {}
        usual = median_low(parts.values())
        return {
            client_id: f"the upload's norm times its weight is {part:.6g}, more than {room:g} "
            f"times the median {usual:.6g} of the round's {len(parts)} uploads, which would be "
            f"lost in a sum sent in {self.settings.download}; with download = 'exact' it counts"
            for client_id, part in parts.items()
            if part > room * usual
        }

    def _sends_sums(self, server: Any, client_id: str) -> bool:
        tree = self.method.broadcast(server, client_id).tree
        return any(tensor.dtype == torch.float64 for tensor in tree.values())

    def close(
        self,
        states: States,
        sent: "Downlink",
        server: Any,
        accepted: Mapping[str, Spooled],
        heard: Iterable[str],
    ) -> float | None:
        """Put what both sides know after a round: that `heard` clients have what was `sent`.

        Returns how far what the server sends next is from its state: the norm of the difference
        over that of the state, None where nothing is rounded.
        """
        up = dict(sent.digests.up)
        if self.settings.upload != "float32":
            for client_id, upload in accepted.items():
                tree = read(Message, upload.file).tree
                key = f"server/received/{client_id}"
                known = Known.of({**self._uploaded(states, key, client_id).tree, **tree})
                states.put(key, known)
                up[client_id] = known.digest
        down = dict(sent.digests.down)
        if self.settings.download in _CHANGES:
            down |= {client_id: sent.known(client_id).digest for client_id in heard}
        if (up, down) != (sent.digests.up, sent.digests.down):
            states.put("server/digests", Digests(down, up))
        return self.publish(states, server, sent.known)

    def publish(
        self, states: States, server: Any, before: Callable[[str], Known] | None = None
    ) -> float | None:
        """Put what clients get of a server's state, as a change of what they had `before`.

        Without that it is the state itself. See `close` for what is returned.
        """
        kind = self.settings.download
        if kind == "exact":
            return None
        trees = {who: self.method.broadcast(server, who).tree for who in self.clients}
        first = next(iter(trees.values()), {})
        apart = any(not _same(first, tree) for tree in trees.values())
        far = 0.0
        for client_id in trees if apart else list(trees)[:1]:
            tree = trees[client_id]
            published = Published(Known.of(cast(tree, torch.float32)))
            if kind != "float32" and tree and before is not None:
                known = before(client_id)
                change = change_of(Message(tree), known, kind, self.init.seed, "download")
                published = Published(Known.of(message_of(change, known).tree), change)
            far = max(far, _distance(published.known.tree, tree))
            if kind != "float32":
                states.put(f"server/published{f'/{client_id}' if apart else ''}", published)
        if apart and kind != "float32":
            states.put("server/published", Published(Known({}, ""), apart=True))
        return far

    def downlink(self, states: States, server: Any = None) -> "Downlink":
        """What clients get of a server's state: of the one in `states` if none is given."""
        if server is None:
            server = server_of(self.method, self.init, states)
        return Downlink(self, states, server)


@dataclass(frozen=True)
class Downlink:
    """What a server in one state sends: each client's message, and how that is sent."""

    coding: Coding
    states: States
    server: Any
    _loaded: dict[str, Published | None] = field(default_factory=dict)
    _float32: list[tuple[Tree, Known]] = field(default_factory=list)

    def message(self, client_id: str) -> Message:
        """What the client has once it was sent it."""
        message = self.coding.method.broadcast(self.server, client_id)
        if self.coding.settings.download == "exact":
            return message
        return replace(message, tree=self._known(client_id, message).tree)

    def sent(self, client_id: str) -> Sent:
        """The message as it is sent: a change if the client has the reference, else in full."""
        message, published = self.message(client_id), self._published(client_id)
        change = None if published is None else published.change
        if change is None or published is None or message.tree is not published.known.tree:
            return message
        has = self.digests.down.get(client_id, "") == change.reference
        return replace(change, facts=message.facts) if has else message

    def known(self, client_id: str) -> Known:
        """The tree of the client's message, with its digest."""
        message = self.coding.method.broadcast(self.server, client_id)
        return self._known(client_id, message)

    @cached_property
    def digests(self) -> Digests:
        """What is known of the clients before this round."""
        return self.states.get("server/digests", Digests) or Digests()

    def _known(self, client_id: str, message: Message) -> Known:
        published = self._published(client_id)
        if published is not None and _alike(published.known.tree, message.tree):
            return published.known
        if not self._float32 or not _same(self._float32[0][0], message.tree):
            self._float32[:] = [(message.tree, Known.of(cast(message.tree, torch.float32)))]
        return self._float32[0][1]

    def _published(self, client_id: str) -> Published | None:
        if self.coding.settings.download not in _CHANGES:
            return None
        common = self._load("server/published")
        if common is not None and common.apart:
            return self._load(f"server/published/{client_id}")
        return common

    def _load(self, key: str) -> Published | None:
        if key not in self._loaded:
            self._loaded[key] = self.states.get(key, Published)
        return self._loaded[key]


def _same(left: Tree, right: Tree) -> bool:
    """Whether two trees hold the same tensors, not only equal ones."""
    return left.keys() == right.keys() and all(left[name] is right[name] for name in left)


def _alike(left: Tree, right: Tree) -> bool:
    return left.keys() == right.keys() and all(has(right, name, left[name]) for name in left)


def _distance(near: Tree, exact: Tree) -> float:
    """The norm of the difference of two trees over that of the exact one; 0 for a tree of zeros."""
    norms = [torch.linalg.vector_norm(near[name].double() - exact[name].double()) for name in exact]
    whole = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in exact.values()]
    return hypot(*map(float, norms)) / (hypot(*map(float, whole)) or 1.0)
