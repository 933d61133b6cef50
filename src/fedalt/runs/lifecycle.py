"""A run in its folder: start it, go on with it, score it again, serve one of its clients."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedalt.core.files import writing_behind
from fedalt.engine.client_work import servings
from fedalt.engine.executor import Executor
from fedalt.engine.generators import Given
from fedalt.engine.members import Members
from fedalt.engine.run import Run
from fedalt.engine.schedule import Arm, Column, Event, HeldOut, Line, Progress
from fedalt.engine.states import client_of
from fedalt.engine.traffic import Coding
from fedalt.engine.workers import Work, workers
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.models.identity import what_differs
from fedalt.runs import setup
from fedalt.runs.beginning import create, require_unused
from fedalt.runs.budget import budget_of_run
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import RunFolder, StoreError, kept_rounds, locked, open_run
from fedalt.runs.kept_settings import require_same_data
from fedalt.runs.observer import Observer, Observers
from fedalt.runs.record import everyone_in, require_clients
from fedalt.runs.settings import Settings, to_toml
from fedalt.runs.setup import Parts, Prepared, facts_of, prepare_newcomer, trainer_of
from fedalt.runs.summary import summarise
from fedalt.runs.together import require_seen


def new_run(prepared: Prepared, path: Path) -> RunFolder:
    """A run's folder before its first round. Raises StoreError for a folder that is in use.

    SettingsError for what only a federation can do.
    """
    require_seen(prepared.parts.settings.privacy)
    settings = to_toml(prepared.parts.settings)
    require_unused(path, settings)
    with locked(path):
        return create(path, settings, facts_of(prepared))


def start_run(prepared: Prepared, path: Path, observer: Observer = Observers()) -> RunFolder:
    """Train and test in a new folder."""
    new_run(prepared, path)
    return resume_run(prepared, path, observer)


def reopen(path: Path, base: Base | None = None) -> Prepared:
    """Prepare an existing run again; StoreError where its data or base model are others now.

    `base` is its base model, if that is loaded already.
    """
    folder = open_run(path)
    require_clients(path)
    prepared, changed = setup.prepare_again(folder, base)
    then, now = folder.facts(), facts_of(prepared)
    require_same_base(path, then, prepared.parts.base)
    require_same_data(path, then, now["data"]["fingerprint"], now["data"]["template"])
    old = [
        f"{name} {number}"
        for name, number in then.get("versions", {}).items()
        if now["versions"].get(name) != number
    ]
    # What else there is to warn of has been said when the run began.
    text = f"the run began with {', '.join(old)}: numbers may differ in their last digits"
    return replace(prepared, warnings=(*changed, *((text,) if old else ())))


def reopen_for(path: Path, client_id: str, base: Base | None = None) -> Prepared:
    """The same over the data of one client, which lie elsewhere if it joined after training."""
    return prepare_newcomer(open_run(path), client_id, base) or reopen(path, base)


def require_same_base(path: Path, facts: Mapping[str, Any], base: Base) -> None:
    """Raise StoreError, which names what differs, for another base model than a run's own."""
    fingerprint = base.fingerprint
    told = (
        what_differs(facts["model"], base.identity, fingerprint)
        if base.identity is not None
        else ""
        if facts["model"]["fingerprint"] == fingerprint
        else f"fingerprint {fingerprint!r}"
    )
    if told:
        raise StoreError(f"{path} began with another base model than {base.name!r} is now: {told}")


def resume_run(prepared: Prepared, path: Path, observer: Observer = Observers()) -> RunFolder:
    """Go on where a run stands, if it is not finished."""
    folder = open_run(path)
    with locked(path):
        folder.progress()
        folder.require_whole()
        with _executor(prepared, path, observer) as executor, writing_behind() as writer:
            journal = _Journal(replace(folder, writer=writer), observer)
            replace(_run(prepared, journal), executor=executor).to_the_end()
        summarise(folder, prepared.parts.settings, observer.on_record)
    return folder


def load_in_worker(path: Path, on_event: Callable[[Event], None]) -> Work:
    """The run of a folder in a worker process, which does what the first process gives it."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    journal = _Journal(open_run(path), notes=[])
    return replace(_run(reopen(path), journal), on_event=on_event).work


def evaluate(
    prepared: Prepared,
    path: Path,
    split: HeldOut,
    round_: int | None = None,
    *,
    only: str | None = None,
) -> list[Line]:
    """Score a round again, the chosen one if none is named; lines like those of rounds.jsonl.

    Of all clients or of `only` one; one that joined after training has no data here, and so no
    lines. Nothing is written.
    """
    folder = open_run(path)
    lines: list[Line] = []
    with locked(path), _executor(prepared, path, Observers()) as executor:
        progress = folder.progress()
        journal = _Journal(folder, notes=lines)
        run = replace(_run(prepared, journal), executor=executor)
        if only is not None:
            there = [client for client in run.members.clients if client == only]
            run = replace(run, members=replace(run.members, clients=there))
        for arm in prepared.parts.arms:
            at = _round(prepared.parts.settings, progress, arm.column, round_)
            run.score(arm, at, split, whole=True)
        run.score_base(split)
    return lines


def score_clients(
    prepared: Prepared, folder: RunFolder, arm: Arm, round_: int, clients: Sequence[str]
) -> list[Line]:
    """Score some clients on their test data after a round; use it within `locked`."""
    lines: list[Line] = []
    journal = _Journal(folder, notes=lines)
    run = replace(_run(prepared, journal), members=Members(clients))
    run.score(arm, round_, "test", whole=True)
    return lines


def require_client(folder: RunFolder, client_id: str) -> None:
    """Raise StoreError for a client that a run does not have."""
    clients = list(everyone_in(folder.facts()))
    if client_id not in clients:
        close = difflib.get_close_matches(client_id, clients, n=3) or clients[:8]
        raise StoreError(f"{folder.path} has no client {client_id!r}, but {', '.join(close)}")


def serving(
    parts: Parts, path: Path, client_id: str, column: Column, round_: int | None = None
) -> Serving:
    """What a client of a run serves: its own model, the shared part, or the local-only baseline."""
    folder = open_run(path)
    require_client(folder, client_id)
    arms = {arm.column: arm for arm in parts.arms}
    wanted: Column = "local" if column == "local" else "own"
    if wanted not in arms:
        raise StoreError(f"{path} has no column 'local': it ran without the local-only baseline")
    with locked(path):
        at = _round(parts.settings, folder.progress(), wanted, round_)
        method, states = arms[wanted].method, folder.states(wanted, at + 1)
        joined = client_id in folder.facts().get("joined", {})
        if joined and states.get(f"clients/{client_id}", method.client_state) is None:
            raise StoreError(f"{path}: client {client_id!r} has joined after round {at + 1}")
        client = client_of(method, parts.init, states, client_id)
        coding = Coding(method, parts.init, parts.settings.traffic)
        message = coding.downlink(states).message(client_id)
        own, shared = servings(method, client, message, client_id, DeployAgain(path, parts, at))
    if column != "shared":
        return own
    if shared is None:
        raise StoreError(f"{path} has no column 'shared': its method shares nothing")
    return shared


@dataclass(frozen=True)
class _Journal:
    """A run's folder with somebody observing; with `notes`, lines go there and nothing is written.

    See `engine.schedule.Journal`.
    """

    folder: RunFolder
    observer: Observer = Observers()
    notes: list[Line] | None = None

    def progress(self) -> Progress:
        return self.folder.progress()

    def states(self, column: str, round_: int) -> FileStates:
        return self.folder.states(column, round_)

    def record(self, line: Line) -> None:
        if self.notes is not None:
            self.notes.append(line)
            return
        self.folder.record(line)
        self.observer.on_record(line)

    def keep_examples(self, lines: Sequence[Line]) -> None:
        if self.notes is None:
            self.folder.keep_examples(lines)

    def commit(self, progress: Progress) -> None:
        if self.notes is None:
            self.folder.commit(progress)


def _executor(
    prepared: Prepared, path: Path, observer: Observer
) -> AbstractContextManager[Executor]:
    """The processes that share a run."""
    count = prepared.parts.settings.training.processes
    device = prepared.parts.base.adapted.device
    return workers(path, load_in_worker, count, device, observer.on_event)


def _run(prepared: Prepared, journal: _Journal) -> Run:
    parts, settings = prepared.parts, prepared.parts.settings
    return Run(
        arms=parts.arms,
        members=Members(prepared.task.clients, settings.clients).without(journal.folder.left()),
        schedule=settings.rounds,
        trainer=trainer_of(prepared),
        init=parts.init,
        journal=journal,
        on_event=journal.observer.on_event,
        firewall=settings.firewall,
        base=setup.base_arm(parts),
        budget=budget_of_run(prepared, journal.folder),
        traffic=settings.traffic,
    )


def _round(settings: Settings, progress: Progress, column: str, wanted: int | None) -> int:
    """The round to read states of: the wanted one if it is still there, or the chosen one."""
    if not progress.rounds_done:
        raise StoreError("no round of this run is done yet")
    if wanted is None:
        return progress.chosen(column, settings.rounds.select)
    kept = kept_rounds(progress, column)
    if wanted not in kept:
        there = ", ".join(str(known + 1) for known in kept)
        raise StoreError(
            f"round {wanted + 1} is not kept; the rounds kept for {column!r} are {there}"
        )
    return wanted


@dataclass(frozen=True)
class DeployAgain:
    """Executes what a client orders before it serves, as was done when it was scored.

    Most methods order nothing: the client data are opened when one does.
    """

    path: Path
    parts: Parts
    round: int

    def __call__(self, orders: Sequence[Given]) -> Sequence[Any]:
        """What the orders give."""
        client_id, *_ = orders[0]  # one client's own, all of them
        prepared = reopen_for(self.path, client_id, self.parts.base)
        return trainer_of(prepared).before_serving(self.round)(orders)
