"""Who can be asked, by name: each client's model and the base model, and how they are asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedalt.adapters.reach import rows_of_embedding
from fedalt.data.prompts import Template, encode_prompt
from fedalt.data.records import Chat, Completion, DataError, Record, Turn
from fedalt.flower.client_model import client_at, served
from fedalt.methods.contract import Serving
from fedalt.models.base import Base
from fedalt.models.checks import require_known_ids
from fedalt.runs.answers import load_run_parts
from fedalt.runs.folder import open_run
from fedalt.runs.serving import Act, round_to_serve, servings_now
from fedalt.runs.setup import Parts, question
from fedalt.serving.batch import Adapters
from fedalt.serving.exports import exported, open_exports

BASE: Final = "base"
_UNCUT: Final = 2**31


@dataclass(frozen=True)
class Model:
    """What a name stands for; `form` and `template` are those of the client's prompts."""

    adapters: Adapters
    form: str
    template: Template

    def chat(self, base: Base, turns: Sequence[Turn]) -> tuple[int, ...]:
        """The ids that a conversation is asked with. Raises DataError."""
        _require_signs(*(turn.content for turn in turns))
        if self.form == "messages":
            return self._ids(base, Chat(tuple(turns), ""))
        if [turn.role for turn in turns] != ["user"]:
            raise DataError(
                "this model was trained on single questions: expected one message, of the role "
                "'user'"
            )
        return self._ids(base, question(self.form, turns[0].content))

    def text(self, base: Base, text: str) -> tuple[int, ...]:
        """The ids of a text that is gone on with as it is. Raises DataError."""
        _require_signs(text)
        return self._ids(base, Completion(text, ""))

    def _ids(self, base: Base, record: Record) -> tuple[int, ...]:
        ids = encode_prompt(record, base.tokenizer, self.template, max_length=_UNCUT)
        require_known_ids(base.tokenizer, ids, rows_of_embedding(base.adapted.model), "the prompt")
        return ids


def _require_signs(*texts: str) -> None:
    """JSON can name halves of signs, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start + 1} is half a sign of Unicode") from None


def nothing_new(_: Act) -> Mapping[str, Model] | None:
    """What does not change has no other models."""
    return None


@dataclass
class Models:
    """All models on one base, and the longest answer if none is asked for, in tokens.

    `newer` gives the models of a run whose best round is another now.
    """

    base: Base
    max_new_tokens: int
    by_name: Mapping[str, Model]
    newer: Callable[[Act], Mapping[str, Model] | None] = field(default=nothing_new, repr=False)


def open_models(path: Path) -> Models:
    """The models of a run, of a federation's client, or of exported folders. Raises ValueError."""
    if client_at(path) is not None:
        of = served(path, None)
        question(of.form, "")  # a classifier writes no text
        parts, name = of.parts, clients_name(path)
        model = _model(parts.base, (name, 0), of.serving, of.form, of.template)
        return Models(parts.base, parts.settings.scoring.max_new_tokens, with_base({name: model}))
    if not (path / "run.json").exists() and (folders := exported(path)):
        return _of_exports(folders)
    parts = load_run_parts(path)
    source = _Run(path, parts)
    models = source.newer(lambda act: act())
    assert models is not None
    return Models(parts.base, parts.settings.scoring.max_new_tokens, models, source.newer)


def clients_name(path: Path) -> str:
    """The name of a federation's client."""
    config = client_at(path)
    assert config is not None
    return config.place.name


def with_base(models: dict[str, Model]) -> dict[str, Model]:
    """Beside the clients the base model, asked as the first of them, unless one has its name."""
    first = next(iter(models.values()))
    alone = Model(Adapters(None, None, None), first.form, first.template)
    return {BASE: alone, **models}


@dataclass
class _Run:
    """A run that may go on, and what of it is known: another round, and other clients, are news."""

    path: Path
    parts: Parts
    known: Any = None

    def newer(self, act: Act) -> Mapping[str, Model] | None:
        folder = open_run(self.path)
        about = folder.staying()
        now = round_to_serve(self.parts, self.path), sorted(about)
        if now == self.known:
            return None
        for of in about.values():
            question(of["form"], "")  # a classifier writes no text
        found = servings_now(self.parts, self.path, list(about), act)
        self.known = found.round, sorted(about)
        template = Template(folder.facts()["data"]["template"])
        base = self.parts.base
        return with_base(
            {
                client: _model(
                    base, (client, *map(str, self.known)), serving, about[client]["form"], template
                )
                for client, serving in found.of.items()
            }
        )


def _model(
    base: Base, key: tuple[Any, ...], serving: Serving, form: str, template: Template
) -> Model:
    return Model(Adapters.of(base, key, serving), form, template)


def _of_exports(folders: Mapping[str, Path]) -> Models:
    base, max_new_tokens, found = open_exports(folders)
    models = {
        name: _model(base, (name,), each.serving, each.form, each.template)
        for name, each in found.items()
    }
    return Models(base, max_new_tokens, with_base(models))
