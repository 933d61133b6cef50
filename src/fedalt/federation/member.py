"""One client of a federation: what it makes of the server's calls, and what it keeps on its disk.

    run.json                     federation, client and terms that the folder belongs to
    clients/ID/0007.safetensors  the client's state after round 7, never sent
    local/...                    the same for training alone, the yardstick
    answer.bin                   the last answer, sent again if it is asked for again
    accepted.json                the last round of which the server said that it counts, and the
                                 digests of all states, of that one and of what was trained since

A round of a client counts once the server says that its upload does. What the client trained in a
round that does not count is dropped, so that client and server never disagree on what was uploaded.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from fedalt import tree as trees
from fedalt.codec import CodecError, atomic_write, decode, encode
from fedalt.disk.reading import StoreError, read_bytes, read_json
from fedalt.engine.course import Arm, Event
from fedalt.engine.firewall import Refused, check_broadcast
from fedalt.engine.in_process import client_of, drive, drive_all
from fedalt.engine.learner import Learner
from fedalt.engine.schedule import training_metrics
from fedalt.federation.accepted import ACCEPTED, Accepted, read_accepted
from fedalt.federation.messages import NEVER, Answer, Call, Cost, Score, digest
from fedalt.federation.terms import Terms
from fedalt.files import make_private_folder
from fedalt.methods.contract import Message, Serving
from fedalt.prepare import Parts, Prepared, learner_of, prepare
from fedalt.settings import SettingsError
from fedalt.states import FileStates
from fedalt.training.group import Trained, TrainingError
from fedalt.training.orders import Order

Hear = Callable[[Event], None]
FORMAT = 2


def ignore(_: Event) -> None:
    """Hear nothing."""


@dataclass(frozen=True)
class Member:
    """A client whose model is loaded and whose data are read. Use it within `locked(folder)`."""

    terms: Terms
    client_id: str
    parts: Parts
    learner: Learner
    folder: Path
    accepted: Accepted
    hear: Hear = ignore

    def answer(self, data: bytes) -> bytes:
        """What to send back to a call; to the same call always the same bytes."""
        call_digest = digest(data)
        kept = self.folder / "answer.bin"
        answer = Answer(
            self.terms.name, self.terms.digest, self.client_id, NEVER, NEVER, call_digest
        )
        try:
            if kept.exists() and _answers(old := read_bytes(kept), call_digest):
                return old
            call = decode(Call, data, finite=True)
            answer = replace(answer, round=call.round, accepted=call.accepted)
            sent = encode(self._carry_out(call, answer))
            atomic_write(kept, sent)
        # These texts name tensors, rounds and settings, never anything of the data.
        except (CodecError, Refused, StoreError, TrainingError) as error:
            return encode(replace(answer, error=str(error).replace(f"{self.folder}/", "")))
        except OSError as error:  # a full disk; where that is, is nobody else's business
            why = error.strerror or type(error).__name__
            return encode(replace(answer, error=f"client {self.client_id!r}: {why}"))
        return sent

    def _carry_out(self, call: Call, answer: Answer) -> Answer:
        self._require_ours(call)
        self._settle(call)
        scores: list[Score] = []
        costs: list[Cost] = []
        upload = None
        for arm in self.parts.arms:
            if arm.column in call.score:
                scores += self._score(arm, call, call.score[arm.column])
        if call.train:
            for arm in self.parts.arms:
                sent, cost = self._train(arm, call)
                costs.append(cost)
                upload = sent if arm.column == "own" else upload
            self.accepted.write(self.accepted.round)  # with the digests of what was trained
        return replace(answer, upload=upload, scores=tuple(scores), costs=tuple(costs))

    def _require_ours(self, call: Call) -> None:
        """Whether the call is for this client, of this federation, under the terms it knows."""
        for what, theirs, ours in (
            ("federation", call.federation, self.terms.name),
            ("client", call.client, self.client_id),
            ("terms", call.terms, self.terms.digest),
        ):
            if theirs != ours:
                raise StoreError(
                    f"client {self.client_id!r}: the call is for {what} {theirs!r}, "
                    f"but this is {ours!r}"
                )

    def _settle(self, call: Call) -> None:
        """Drop what does not count; refuse a server that has forgotten what it said."""
        known = self.accepted.round
        if call.accepted < known:
            raise StoreError(
                f"client {self.client_id!r}: the server says that round {call.accepted} was the "
                f"last to count, but it said {known} before; nothing was changed. It was set back "
                "to an older state, or this is an old message"
            )
        kept = self.accepted.kept
        if call.accepted != NEVER:
            mine = kept.newest(self.folder / "clients" / self.client_id, call.accepted)
            if mine is None or int(mine.stem) != call.accepted:
                raise StoreError(
                    f"client {self.client_id!r}: the server counts an upload of round "
                    f"{call.accepted}, but {self.folder} has no state of it; restore the folder "
                    "from a backup, or let the server's operator take the client out"
                )
        stale = []
        for arm in self.parts.arms:
            keep = {call.accepted, call.keep.get(arm.column, call.accepted)}
            stale += kept.settle(self._folder(arm.column), sorted(keep))
        self.accepted.write(call.accepted)
        for file in stale:
            file.unlink(missing_ok=True)

    def _score(self, arm: Arm, call: Call, round_: int) -> list[Score]:
        """Score what the client serves after a round; on test data also the shared part."""
        whole = call.split == "test"
        examples = self.learner.task.examples(self.client_id, call.split)
        if not examples:
            return []
        states = self._states(arm.column, round_ + 1)
        client = client_of(arm.method, self.parts.start, states, self.client_id)
        message = self._message(arm, call)
        deploying = arm.method.deploy(client, message)
        own = drive(deploying, self.learner.deploying(round_), self.client_id)
        shared = arm.method.shared(client, message) if whole else None

        def scored(column: str, serving: Serving) -> Score:
            (found,) = self.learner.score([(serving, examples)], generate=whole)
            return Score(column, call.split, round_, found.metrics)

        scores = [scored(arm.column, own)]
        if shared is not None:
            same = shared.plan == own.plan and trees.equal(shared.tree, own.tree)
            scores.append(replace(scores[0], column="shared") if same else scored("shared", shared))
        what: Literal["validate", "test"] = "test" if whole else "validate"
        self.hear(Event(what, round_, arm.column, self.client_id, 1, 1))
        return scores

    def _train(self, arm: Arm, call: Call) -> tuple[Message, Cost]:
        """The client's half of a round; its new state stays here, its upload is returned."""
        began = time.monotonic()
        states = self._states(arm.column, call.round)
        client = client_of(arm.method, self.parts.start, states, self.client_id)
        message = self._message(arm, call)
        check_broadcast(message, arm.method, self.parts.start, client)

        def on_step(client_id: str, done: int, of: int, loss: float) -> None:
            self.hear(Event("train", call.round, arm.column, client_id, done, of, loss))

        together = self.learner.carry_out(call.round, states, on_step)
        fits: list[Trained] = []

        def carry_out(orders: Sequence[tuple[str, int, Order]]) -> list[object]:
            found = together(orders)
            fits.extend(cost for _, cost in found if cost is not None)
            return [answer for answer, _ in found]

        steps = {self.client_id: arm.method.local(client, message)}
        after, upload = drive_all(steps, carry_out)[self.client_id]
        states.put(f"clients/{self.client_id}", after)
        return upload, Cost(arm.column, training_metrics(fits), time.monotonic() - began)

    def _message(self, arm: Arm, call: Call) -> Message:
        """What the server sent, or, for the yardstick, what a server without clients would send."""
        if arm.column == "own":
            return call.message
        return arm.method.broadcast(arm.method.init_server(self.parts.start), self.client_id)

    def _folder(self, column: str) -> Path:
        """The yardstick has a folder of its own, as in a run's folder."""
        return self.folder / "local" if column == "local" else self.folder

    def _states(self, column: str, round_: int) -> FileStates:
        return FileStates(self._folder(column), round_, kept=self.accepted.kept)


def is_last(data: bytes) -> bool:
    """Whether a call says that nothing comes after it."""
    try:
        return decode(Call, data).last
    except CodecError:
        return False


def _answers(data: bytes, call_digest: str) -> bool:
    """Whether kept bytes are the answer to this call; a damaged file is none."""
    try:
        return decode(Answer, data).call == call_digest
    except CodecError:
        return False


def open_member(
    terms: Terms,
    client_id: str,
    data: Path,
    folder: Path,
    *,
    model: str | None = None,
    device: str | None = None,
    hear: Hear = ignore,
) -> Member:
    """Load the model and read the data of one client; its folder is made if it is not there.

    Raises SettingsError, DataError, ModelError or StoreError where something does not fit.
    """
    if client_id not in terms.clients:
        raise SettingsError(
            f"client {client_id!r} is not in the terms of {terms.name!r}, which name "
            f"{', '.join(terms.clients)}"
        )
    if folder.exists():  # before a model is loaded for nothing
        read_accepted(folder).kept.digests.require_whole()
    settings = replace(
        terms.settings,
        data=replace(terms.settings.data, path=data),
        model=replace(
            terms.settings.model,
            name=model or terms.settings.model.name,
            device=device or terms.settings.model.device,
        ),
    )
    prepared = prepare(settings, clients=terms.clients)
    _require_fitting(prepared, terms, client_id, data)
    make_private_folder(folder)
    accepted = claim(folder, terms, client_id)
    return Member(terms, client_id, prepared.parts, learner_of(prepared), folder, accepted, hear)


def _require_fitting(prepared: Prepared, terms: Terms, client_id: str, data: Path) -> None:
    """One client's data, of the agreed labels, for the agreed base model."""
    if prepared.task.clients != (client_id,):
        raise SettingsError(
            f"{data} holds the clients {', '.join(prepared.task.clients)}, but this is the place "
            f"of {client_id!r} alone: name its files {client_id}.train.jsonl and so on"
        )
    if tuple(prepared.task.labels) != terms.labels:
        raise SettingsError(
            f"{data} has the labels {', '.join(prepared.task.labels) or '(none)'}, but the terms "
            f"of {terms.name!r} say {', '.join(terms.labels) or '(none)'}"
        )
    found = prepared.parts.base.fingerprint
    if found != terms.model:
        raise SettingsError(
            f"the base model {prepared.parts.base.name!r} here has the fingerprint {found!r}, but "
            f"the terms of {terms.name!r} are about {terms.model!r}: it is another model"
        )


class _About(TypedDict):
    format: int


def claim(folder: Path, terms: Terms, client_id: str) -> Accepted:
    """A folder belongs to one client of one federation for ever; what it says of its states."""
    about = {"format": FORMAT, "federation": terms.name, "client": client_id, "terms": terms.digest}
    file = folder / "run.json"
    if not file.exists():
        for each in (ACCEPTED, "clients", "answer.bin"):
            if (folder / each).exists():
                raise StoreError(f"{file} is missing, but {folder / each} is there")
        atomic_write(file, (json.dumps(about, indent=2) + "\n").encode())
    found = read_json(file, _About)
    if found["format"] != FORMAT:
        raise StoreError(
            f"{file}: a client's folder of format {found['format']}, but this version reads "
            f"{FORMAT}; the version that began the federation goes on with it"
        )
    if found != about:
        key = next((key for key in about if found.get(key) != about[key]), min(found))
        raise StoreError(
            f"{file}: the folder belongs to {key} {found.get(key)!r}, but this is "
            f"{about.get(key)!r}; use another folder for it"
        )
    kept = folder / "answer.bin"
    if kept.exists() and not kept.is_file():
        raise StoreError(f"{kept} cannot be read: it is no file")
    accepted = read_accepted(folder)
    accepted.kept.digests.require_there()
    return accepted
