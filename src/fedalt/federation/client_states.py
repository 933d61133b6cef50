"""What a client keeps of the server's calls, so that its owner has the model without the server.

    server/broadcast/0007.safetensors  what the server sent after round 7
    served.json                        the round whose model counts, for each column

A client's model is made of its own state and of what the server sends, in FedALT the others' mean.
A broadcast counts whether or not the client's own upload of its round does.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from fedalt.core.codec import CodecError, atomic_write, read
from fedalt.core.reading import StoreError, read_json
from fedalt.core.tree import Tree, cast
from fedalt.engine.changes import Known, ReferenceLackedError, message_of, whole
from fedalt.engine.firewall import quoted
from fedalt.engine.traffic import Coding
from fedalt.federation.accepted import KEPT, Accepted, folder_of, read_accepted
from fedalt.federation.call_checks import CallRefused
from fedalt.federation.messages import Call
from fedalt.methods.contract import Message
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.kept import AREAS, file_of, rounds_in
from fedalt.runs.settings import Settings

SERVER: Final = "server"
BROADCAST: Final = f"{SERVER}/broadcast"
CHOSEN: Final = "served.json"


def keep(accepted: Accepted, call: Call, settings: Settings) -> None:
    """Keep a call's broadcast, and which round's model the client would use now.

    That is the round that is being tested; before any test the best one, if the settings say so,
    the server has told one and this client was there to hear of it, else the one before the
    call's. `accepted` is what counts in the client's folder, from now on this broadcast too.
    """
    folder, after = accepted.folder, call.score.get("own", call.round - 1)
    if not call.last and after >= 0:
        _forget(accepted, folder / BROADCAST / file_of(after))
        FileStates(folder, after, kept=accepted.kept).put(BROADCAST, whole(call.message))
        accepted.write(accepted.round)
    if call.split == "test" and call.score:
        chosen = dict(call.score)
    else:
        best = call.keep if settings.rounds.select == "best" else {}
        if "own" in best and best["own"] not in _broadcasts(accepted):
            best = {}
        if call.last:
            chosen = {**_chosen(folder), **({} if settings.rounds.test else best)}
        else:
            chosen = {column: best.get(column, after) for column in ("own", "local")}
    if min(chosen.values(), default=-1) >= 0:
        atomic_write(folder / CHOSEN, json.dumps(chosen).encode())


def _forget(accepted: Accepted, file: Path) -> None:
    """Let a file that is about to be replaced not count, on disk too, until it has been.

    A server that was set back sends something else after a round than before, and a client that is
    killed between file and digest would refuse its own folder.
    """
    if file.name in accepted.kept.digests.names(file.parent):
        accepted.kept.digests.forget(file)
        accepted.write(accepted.round)


def settle(accepted: Accepted, call: Call, columns: Iterable[str]) -> None:
    """Drop what the server did not accept, and what nobody needs; remember what it did accept."""
    stale, kept = [], accepted.kept
    used = _chosen(accepted.folder) if call.last else {}  # else `keep` is about to choose again
    last = accepted.last_rounds(call.client, call.accepted)
    for column in columns:
        wanted = {each[column] for each in (call.keep, used) if column in each}
        limits = {*last, *(min(round_, call.accepted) for round_ in wanted)}
        place = folder_of(accepted.folder, column)
        stale += kept.settle(place, sorted(limits), [area for area in AREAS if area != SERVER])
        stale += kept.settle(place, sorted(limits | wanted), [SERVER])
    accepted.write(call.accepted)
    for file in stale:
        file.unlink(missing_ok=True)


def received(accepted: Accepted, call: Call, coding: Coding) -> Call:
    """A call with its message, which may have come as the change of one that is kept here.

    Raises ReferenceLackedError where it is not, CallRefused for a change that cannot be read.
    """
    change = call.message
    if isinstance(change, Message):
        return call
    try:
        for tree in _kept_trees(accepted, coding, call.client):
            known = Known.of(tree)
            if known.digest == change.reference:
                return replace(call, message=message_of(change, known))
    except CodecError as error:
        raise CallRefused(
            f"client {call.client!r}: the call's message cannot be read: {error}"
        ) from error
    raise ReferenceLackedError(
        f"client {call.client!r} has nothing with the digest {quoted(change.reference)}, of which "
        "the call's message is a change"
    )


def _kept_trees(accepted: Accepted, coding: Coding, client_id: str) -> Iterator[Tree]:
    """What the server may know this client to have: nothing, its last broadcasts, the first one."""
    yield {}
    for round_ in sorted(_broadcasts(accepted), reverse=True):
        states = FileStates(accepted.folder, round_ + 1, kept=accepted.kept)
        message = states.get(BROADCAST, Message)
        if message is not None:
            yield message.tree
    first = coding.method.broadcast(coding.method.init_server(coding.init), client_id)
    yield cast(first.tree, torch.float32)


def _broadcasts(accepted: Accepted) -> list[int]:
    """The rounds after which the server has sent what is kept."""
    return rounds_in(accepted.kept.digests.names(accepted.folder / BROADCAST))


def round_to_serve(folder: Path, column: str, wanted: int | None) -> int:
    """The wanted round, if it is kept, or the chosen one. Raises StoreError."""
    kept = sorted(int(file.stem) for file in (folder / BROADCAST).glob("[0-9]*.safetensors"))
    chosen = _chosen(folder).get(column)
    if not kept or chosen is None:
        raise StoreError(
            f"{folder} has no model to use yet: its client has not heard from the server after a "
            "round; `fedalt client` takes part"
        )
    at = chosen if wanted is None else wanted
    if column == "local":
        kept = sorted({*_local_rounds(folder, kept), *([at] if wanted is None else [])})
    if at not in kept:
        raise StoreError(
            f"{folder}: round {at + 1} is not kept; the rounds kept are "
            + ", ".join(str(known + 1) for known in kept)
        )
    return at


def _local_rounds(folder: Path, heard: Iterable[int]) -> set[int]:
    """The rounds after which the local-only baseline is known, of those `heard` and trained.

    Between states that are older than the last ones others may have been dropped.
    """
    digests, place = read_accepted(folder).kept.digests, folder_of(folder, "local") / "clients"
    named = (rounds_in(digests.names(place / who)) for who in digests.folders(place))
    trained = sorted(round_ for rounds in named for round_ in rounds)
    since = trained[-KEPT] if len(trained) >= KEPT else 0
    return {*trained, *(round_ for round_ in heard if round_ >= since)}


def broadcast_after(folder: Path, round_: int) -> Message:
    """What the server sent after a round. Raises StoreError where that is damaged."""
    try:
        return read(Message, folder / BROADCAST / f"{round_:04d}.safetensors")
    except (CodecError, OSError) as error:
        raise StoreError(f"what the server sent after round {round_ + 1}: {error}") from error


def _chosen(folder: Path) -> Mapping[str, int]:
    file = folder / CHOSEN
    chosen: dict[str, int] = read_json(file, dict[str, int]) if file.exists() else {}
    return chosen
