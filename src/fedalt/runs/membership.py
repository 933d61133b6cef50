"""Clients that come to a run when it has trained already, and clients that leave it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedalt.adapters.initializer import Initializer
from fedalt.engine.generators import run_generators
from fedalt.engine.robust import central_loss
from fedalt.engine.schedule import UNTRAINED, Line
from fedalt.engine.states import client_of
from fedalt.engine.traffic import Coding
from fedalt.runs.folder import RunFolder, StoreError, kept_rounds, locked, open_run
from fedalt.runs.kept_settings import settings_of_run
from fedalt.runs.lifecycle import require_client, require_same_base, score_clients
from fedalt.runs.record import everyone_in, require_clients
from fedalt.runs.settings import Settings, method_name
from fedalt.runs.setup import Prepared, base_arm, facts_of, prepare_newcomers, trainer_of
from fedalt.runs.together import fault_of_leaving


def join(
    path: Path,
    data: Path,
    *,
    epochs: int | None = None,
    warn: Callable[[Sequence[str]], None] = lambda _: None,
) -> list[Line]:
    """Let clients in that were not in training; the lines of their scores on their test data.

    Each newcomer gets what the server of the tested round sends, trains its own part on it for
    `epochs` (without a number, the run's local epochs) and keeps its state in the run's folder. The
    server hears nothing of it: no one else's model changes. Beside it, the local-only
    baseline trains for as long. `warn` is told what the user should know before that. Raises
    StoreError for clients of the run and for other labels.
    """
    folder = open_run(path)
    require_clients(path)
    prepared = _newcomers(folder, data, epochs)
    warn(prepared.warnings)
    clients = prepared.task.clients
    with locked(path):
        progress = folder.progress()
        if not progress.rounds_done:
            raise StoreError(f"{path} has nothing to join yet: no round of it is done")
        lines: list[Line] = []
        for arm in prepared.parts.arms:
            at = progress.chosen(arm.column, prepared.parts.settings.rounds.select)
            execute = trainer_of(prepared).joining(at)
            read, write = folder.states(arm.column, at + 1), folder.states(arm.column, at)
            coding = Coding(arm.method, prepared.parts.init, prepared.parts.settings.traffic)
            downlink = coding.downlink(read)
            for client_id in clients:
                client = client_of(arm.method, prepared.parts.init, read, client_id)
                steps = {client_id: arm.method.local(client, downlink.message(client_id))}
                after, _ = run_generators(steps, execute)[client_id]
                write.put(f"clients/{client_id}", after)
            lines += score_clients(prepared, folder, arm, at, clients)
        if (base := base_arm(prepared.parts)) is not None:
            lines += score_clients(prepared, folder, base, UNTRAINED, clients)
        trained = prepared.parts.settings.training.local_epochs
        joined = {
            client_id: {**about, "data": str(data.absolute()), "epochs": trained}
            for client_id, about in facts_of(prepared)["clients"].items()
        }
        folder.add_facts({"joined": {**folder.facts().get("joined", {}), **joined}})
    return lines


def leave(path: Path, client_id: str) -> None:
    """Take a client's last upload out of what the server sends, and the client out of the run.

    Its own state stays where it is. Raises StoreError where the method cannot tell what the
    client has put in. Interrupted, it can be repeated.
    """
    folder = open_run(path)
    require_client(folder, client_id)
    settings, _ = settings_of_run(folder)
    method = settings.method
    if settings.privacy.unit == "client":
        raise StoreError(
            f"{path} is private ([privacy] unit = 'client'): what {client_id!r} has put in carries "
            "noise that protects the others too, so it cannot be taken out"
        )
    if settings.privacy.secure_sum:
        fault = fault_of_leaving(settings.privacy, settings.traffic)
        raise StoreError(f"{path}: {client_id!r} cannot be taken out: {fault}")
    with locked(path):
        rounds = kept_rounds(folder.progress(leaving=client_id), "own")
        without = {}
        for at in rounds:
            server = folder.states("own", at + 1).get("server", method.server_state)
            if server is not None:
                without[at] = method.without(server, client_id)
        # What later rounds can leave out is not yet out of what others have made of it.
        if None in without.values() or getattr(method, "mingled", False):
            raise StoreError(
                f"{method_name(method)} averages uploads, so the contribution of {client_id!r} "
                "cannot be removed"
            )
        folder.add_facts({"leaving": client_id})  # from here on until the end nothing else goes on
        coding = _coding_without(folder, settings, client_id)
        for round_, server in without.items():
            states = folder.states("own", round_)
            states.put("server", server)
            coding.publish(states, server)
        folder.forget_uploads(client_id)
        folder.set_best(_best_without(folder, client_id))
        left = sorted({*folder.facts().get("left", []), client_id})
        folder.add_facts({"left": left, "leaving": None})


def _best_without(folder: RunFolder, client_id: str) -> dict[str, tuple[int, float]]:
    """The best rounds so far with the losses of those who stay, which later rounds are held to."""
    lines, best = folder.lines(), {}
    gone = {client_id, *folder.left()}
    for column, (round_, _) in folder.progress(leaving=client_id).best.items():
        losses = [
            line["metrics"]["loss"]
            for line in lines
            if (line["kind"], line.get("split")) == ("score", "validation")
            and (line["column"], line["round"]) == (column, round_)
            and line["client"] not in gone
        ]
        if losses:
            best[column] = round_, central_loss(losses)
    return best


def _coding_without(folder: RunFolder, settings: Settings, client_id: str) -> Coding:
    """Publishes the server's states anew to those who stay; nothing of it begins from the start."""
    staying = [who for who in folder.facts()["clients"] if who not in {client_id, *folder.left()}]
    return Coding(settings.method, Initializer({}, {}, settings.seed), settings.traffic, staying)


def _newcomers(folder: RunFolder, data: Path, epochs: int | None) -> Prepared:
    """The run's settings over the newcomers' data, if they fit together."""
    prepared = prepare_newcomers(folder, data, epochs)
    then, now = folder.facts(), facts_of(prepared)
    if twice := everyone_in(then).keys() & set(prepared.task.clients):
        raise StoreError(f"{folder.path} has a client {min(twice)!r} already; rename its files")
    if then["data"]["labels"] != now["data"]["labels"]:
        raise StoreError(
            f"{data} does not fit {folder.path}: the run's labels are {then['data']['labels']!r}, "
            f"these are {now['data']['labels']!r}"
        )
    require_same_base(folder.path, then, prepared.parts.base)
    return prepared
