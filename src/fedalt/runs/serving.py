"""What all clients of a run serve, read while the run may go on in another process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedalt.engine.client_work import servings
from fedalt.engine.generators import Given
from fedalt.engine.schedule import Progress
from fedalt.engine.states import client_of
from fedalt.engine.traffic import Coding
from fedalt.methods.contract import Serving
from fedalt.runs.folder import StoreError, open_run
from fedalt.runs.lifecycle import DeployAgain
from fedalt.runs.record import read_standing
from fedalt.runs.setup import Parts

# Carries out an act that needs the base model for itself.
Act = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class RunServings:
    """What each client serves after a round."""

    round: int
    of: dict[str, Serving]


def round_to_serve(parts: Parts, path: Path) -> int:
    """The round that a run would test now. Raises StoreError before the first one is done."""
    now = read_standing(path)
    if not now.rounds_done:
        raise StoreError(f"no round of {path} is done yet")
    progress = Progress(now.rounds_done, now.best, now.tested)
    return progress.chosen("own", parts.settings.rounds.select)


def servings_now(parts: Parts, path: Path, clients: Sequence[str], act: Act) -> RunServings:
    """What these clients serve, after the round that the run would test now.

    Some methods train before they serve; that is left to `act`. Raises StoreError.
    """
    while True:
        standing = read_standing(path)
        try:
            at = round_to_serve(parts, path)
            return RunServings(at, _read(parts, path, clients, at, act))
        except StoreError:
            if read_standing(path) == standing:
                raise
            # Another process has committed since, and dropped what no one needs.


def _read(
    parts: Parts, path: Path, clients: Sequence[str], at: int, act: Act
) -> dict[str, Serving]:
    method, states = parts.arms[0].method, open_run(path).states("own", at + 1)
    downlink = Coding(method, parts.start, parts.settings.traffic).downlink(states)
    again = DeployAgain(path, parts, at)

    def execute(orders: Sequence[Given]) -> Sequence[Any]:
        done: Sequence[Any] = act(partial(again, orders))
        return done

    found = {}
    for client_id in clients:
        client = client_of(method, parts.start, states, client_id)
        message = downlink.message(client_id)
        found[client_id], _ = servings(method, client, message, client_id, execute)
    return found
