"""One round of any method: the cohort trains, uploads are screened and spooled, then aggregated."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedalt.adapters.start import Start
from fedalt.core.codec import encode
from fedalt.engine.blame import aggregate
from fedalt.engine.dry_run import DryRuns
from fedalt.engine.screening import Screening
from fedalt.engine.states import States, server_of
from fedalt.engine.uploads import Metrics, Upload, UploadStore
from fedalt.methods.contract import AnyMethod, Message

# Trains a cohort on what a server in this state sends: the uploads, sorted by client. They come
# one at a time, from an executor or from a federation's clients.
Train = Callable[[Any, Sequence[str]], Iterable[Upload]]


@dataclass(frozen=True)
class ClientRound:
    """A client's round: bytes of both encoded messages, seconds as its part of its group's.

    `refused` says why its upload was rejected: its state is then the one before the round.
    """

    client_id: str
    upload_bytes: int
    download_bytes: int
    seconds: float
    metrics: Metrics = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a round came to: its clients, sorted, and whether the server's state is a new one."""

    clients: list[ClientRound]
    aggregated: bool


def run_round(
    method: AnyMethod,
    start: Start,
    states: States,
    cohort: Sequence[str],
    train: Train,
    screening: Screening,
    *,
    leaving: Sequence[str] = (),
) -> Outcome:
    """Broadcast, local training, upload and aggregation for the clients of a cohort.

    `train` puts the clients' new states where `states` are; those of rejected uploads are dropped
    again. Without an accepted upload the server keeps its state, but for the part of those who are
    `leaving`. Nothing counts before the caller commits the round.
    """
    states.begin()
    server = server_of(method, start, states, leaving)
    forms_of, broadcast_size = DryRuns(method, start), _Sizes()
    costs = []
    with states.spooling() as folder:
        uploads = UploadStore(folder, states, screening)
        for upload in train(server, cohort):
            broadcast = method.broadcast(server, upload.client_id)
            data = encoded(upload.message)
            forms = forms_of(upload.client_id, broadcast)
            reason = screening.reason(upload.message, len(data), forms)
            if reason is None:
                uploads.spool(upload, data)
            else:
                uploads.reject(upload.client_id, reason, data)
            sent = upload.download_bytes
            sent = broadcast_size(broadcast) if sent is None else sent
            costs.append((upload.client_id, len(data), sent, upload.seconds, upload.metrics))
        if cohort:
            after = aggregate(method, server, uploads, forms_of)
        else:  # a round in which nobody takes part is a round too
            after = method.aggregate(server, ())
        rejected = uploads.rejected
    if after is not None or leaving:
        states.put("server", server if after is None else after)
    clients = [ClientRound(*cost, refused=rejected.get(cost[0])) for cost in costs]
    return Outcome(clients, after is not None)


def encoded(message: Message) -> bytes:
    """The message as bytes; one without tensors and facts is not sent at all."""
    return encode(message) if message.tree or message.facts else b""


class _Sizes:
    """Sizes of broadcasts; one that is the same for every client is encoded once."""

    def __init__(self) -> None:
        self._last: Message | None = None
        self._bytes = 0

    def __call__(self, message: Message) -> int:
        last = self._last
        if last is None or last.tree is not message.tree or last.facts != message.facts:
            self._last, self._bytes = message, len(encoded(message))
        return self._bytes
