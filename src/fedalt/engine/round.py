"""One round of any method: the cohort trains, uploads are screened and spooled, then aggregated."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fedalt.adapters.initializer import Initializer
from fedalt.core.codec import encode
from fedalt.engine.adaptive_clip import WITHIN
from fedalt.engine.blame import aggregate
from fedalt.engine.changes import Sent
from fedalt.engine.dry_run import DryRuns
from fedalt.engine.firewall import Screening
from fedalt.engine.privacy import Release
from fedalt.engine.states import States, server_of
from fedalt.engine.traffic import Coding, Downlink
from fedalt.engine.uploads import Metrics, Upload, UploadStore
from fedalt.methods.contract import AnyMethod

# Trains a cohort on what the server sends: the uploads, sorted by client. They come one at a time,
# from an executor or from a federation's clients.
Train = Callable[[Downlink, Sequence[str]], Iterable[Upload]]


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
    """What a round came to: its clients, sorted, and whether the server's state is a new one.

    `download_error` is how far what is sent next is from that state, see `Coding.close`. `clip` is
    the largest norm of a client's change, where it follows those of the rounds before.
    """

    clients: list[ClientRound]
    aggregated: bool
    download_error: float | None = None
    clip: float | None = None


def run_round(
    method: AnyMethod,
    init: Initializer,
    states: States,
    cohort: Sequence[str],
    train: Train,
    screening: Screening,
    *,
    release: Release | None,
    coding: Coding,
    heard: Callable[[], Iterable[str]],
    leaving: Sequence[str] = (),
) -> Outcome:
    """Broadcast, local training, upload and aggregation for the clients of a cohort.

    `train` puts the clients' new states where `states` are; those of rejected uploads are dropped
    again. Without an accepted upload the server keeps its state, but for the part of those who are
    `leaving`. `release` has the noise of the uploads' sum, where there is any. Nothing counts
    before the caller commits the round. `heard` tells afterwards who has received what the server
    sent: uploads may be of others, too, who were sent something else or nothing.
    """
    states.begin()
    server = server_of(method, init, states, leaving)
    downlink = coding.downlink(states, server)
    forms_of, broadcast_size = DryRuns(method, init), _Sizes()
    costs = []
    with states.spooling() as folder:
        uploads = UploadStore(folder, states, screening, release)
        for upload in train(downlink, cohort):
            client_id, data = upload.client_id, encoded(upload.message)
            forms = forms_of(client_id, downlink.message(client_id))
            open_ = partial(coding.open, states, client_id, upload.message, forms)
            message, reason = screening.screened(open_, len(data), forms)
            if message is not None:
                uploads.spool(upload, message, data)
            else:
                uploads.reject(client_id, reason, data)
            sent = upload.download_bytes
            sent = broadcast_size(downlink.sent(client_id)) if sent is None else sent
            costs.append((client_id, len(data), sent, upload.seconds, upload.metrics))
        if cohort:
            # By others' sizes, which no noise hides, nobody is rejected where there is to be some.
            drowning = (coding.drowning,) if release is None else ()
            after = aggregate(method, server, uploads, forms_of, *drowning)
        else:  # a round in which nobody takes part is a round too
            after = method.aggregate(server, ())
        if after is not None or leaving:
            states.put("server", server if after is None else after)
        if after is not None and release is not None:
            accepted = (cost[-1] for cost in costs if cost[0] in uploads.accepted)
            release.settle([metrics.get(WITHIN, 1) > 0.5 for metrics in accepted])
        sends = server if after is None else after
        error = coding.close(states, downlink, sends, uploads.accepted, heard())
    clients = [ClientRound(*cost, refused=uploads.rejected.get(cost[0])) for cost in costs]
    return Outcome(clients, after is not None, error, None if release is None else release.clip)


def encoded(message: Sent) -> bytes:
    """The message as bytes; one without tensors and facts is not sent at all."""
    return encode(message) if message.tree or message.facts else b""


class _Sizes:
    """Sizes of broadcasts; one that is the same for every client is encoded once."""

    def __init__(self) -> None:
        self._last: Sent | None = None
        self._bytes = 0

    def __call__(self, message: Sent) -> int:
        last = self._last
        if last is None or last.tree is not message.tree or last.facts != message.facts:
            self._last, self._bytes = message, len(encoded(message))
        return self._bytes
