"""What one client gets out of a run: its model, which answers or is exported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalt.adapters.reach import rows_of_embedding
from fedalt.data.prompts import Template, encode_prompt
from fedalt.data.records import DataError
from fedalt.engine.schedule import Column
from fedalt.evaluation import Scoring, generate
from fedalt.evaluation.asking import fitted
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.models.checks import require_known_ids
from fedalt.runs.folder import open_run
from fedalt.runs.kept_settings import settings_of_run
from fedalt.runs.lifecycle import require_client, require_same_base, serving
from fedalt.runs.record import require_clients
from fedalt.runs.setup import Parts, load_parts, question


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
    about: Mapping[str, Any] = {**facts["clients"], **facts.get("joined", {})}[client_id]
    return Served(
        parts,
        serving(parts, path, client_id, column, round_),
        about["form"],
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
