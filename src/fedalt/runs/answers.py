"""What clients get out of a run: a model that answers or is exported; all models, for a server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedalt.adapters.reach import rows_of_embedding
from fedalt.data.prompts import Template, encode_prompt
from fedalt.data.records import DataError
from fedalt.engine.client_work import servings
from fedalt.engine.generators import Given
from fedalt.engine.schedule import Column, Progress
from fedalt.engine.states import client_of
from fedalt.engine.traffic import Coding
from fedalt.evaluation import Scoring, generate
from fedalt.evaluation.asking import fitted
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.models.checks import require_known_ids
from fedalt.runs.folder import StoreError, open_run
from fedalt.runs.kept_settings import settings_of_run
from fedalt.runs.lifecycle import DeployAgain, require_client, require_same_base, serving
from fedalt.runs.record import everyone_in, read_standing, require_clients
from fedalt.runs.setup import Parts, load_parts, question

# Carries out an act that needs the base model for itself.
Act = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class Served:
    """A client's model on its base; `form` and `template` are those of the client's prompts."""

    parts: Parts
    serving: Serving
    form: str
    template: Template


def load_run_parts(path: Path, base: Base | None = None) -> Parts:
    """What gives a run's states their meaning; `base` is its base model, if that is loaded.

    Raises StoreError for another base model than the run began with.
    """
    folder = open_run(path)
    require_clients(path)
    settings, _ = settings_of_run(folder)
    facts = folder.facts()
    parts = load_parts(settings, facts["data"]["labels"], base)
    require_same_base(path, facts, parts.base)
    return parts


def served(
    path: Path,
    client_id: str,
    column: Column = "own",
    round_: int | None = None,
    base: Base | None = None,
) -> Served:
    """A client's model after a round, the tested one if none is named. Raises StoreError."""
    folder = open_run(path)
    require_clients(path)
    require_client(folder, client_id)
    facts = folder.facts()
    parts = load_run_parts(path, base)
    return Served(
        parts,
        serving(parts, path, client_id, column, round_),
        everyone_in(facts)[client_id]["form"],
        Template(facts["data"]["template"]),
    )


def answers(of: Served, texts: Sequence[str], scoring: Scoring | None = None) -> list[str]:
    """What the client's model answers to each text; by the run's own scoring if none is given.

    A text takes the form of the client's records; where those are instructions, it goes through
    the run's template.
    """
    prompts = [prompt_of(of, text) for text in texts]
    return generate(of.parts.base, of.serving, prompts, scoring or of.parts.settings.scoring)


def prompt_of(of: Served, text: str) -> tuple[int, ...]:
    """The ids that a text is asked with, as the run asks in its own scoring.

    Raises DataError for a client of a classifier, and for a text that holds bytes of no UTF-8, as
    Python hands on words of a command line.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the question is not UTF-8: character {error.start + 1} is {text[error.start]!a}"
        ) from None
    base, settings = of.parts.base, of.parts.settings
    prompt = encode_prompt(
        question(of.form, text),
        base.tokenizer,
        of.template,
        max_length=min(settings.data.max_length, base.positions),
    )
    ids = fitted(base, prompt, settings.scoring)
    require_known_ids(base.tokenizer, ids, rows_of_embedding(base.adapted.model), "the question")
    return ids


def round_to_serve(parts: Parts, path: Path) -> int:
    """The round that a run would test now. Raises StoreError before the first one is done."""
    now = read_standing(path)
    if not now.rounds_done:
        raise StoreError(f"no round of {path} is done yet")
    progress = Progress(now.rounds_done, now.best, now.tested)
    return progress.chosen("own", parts.settings.rounds.select)


def servings_now(
    parts: Parts, path: Path, clients: Sequence[str], act: Act
) -> tuple[int, dict[str, Serving]]:
    """The round that the run would test now, and what these clients serve after it.

    Some methods train before they serve; that is left to `act`. Raises StoreError.
    """
    while True:
        standing = read_standing(path)
        try:
            at = round_to_serve(parts, path)
            return at, _read(parts, path, clients, at, act)
        except StoreError:
            if read_standing(path) == standing:
                raise
            # Another process has committed since, and dropped what no one needs.


def _read(
    parts: Parts, path: Path, clients: Sequence[str], at: int, act: Act
) -> dict[str, Serving]:
    method, states = parts.arms[0].method, open_run(path).states("own", at + 1)
    downlink = Coding(method, parts.init, parts.settings.traffic).downlink(states)
    again = DeployAgain(path, parts, at)

    def execute(orders: Sequence[Given]) -> Sequence[Any]:
        done: Sequence[Any] = act(partial(again, orders))
        return done

    found = {}
    for client_id in clients:
        client = client_of(method, parts.init, states, client_id)
        message = downlink.message(client_id)
        found[client_id], _ = servings(method, client, message, client_id, execute)
    return found
