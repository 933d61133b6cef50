"""Who can be asked, by name: each client's model and the base model, and how they are asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedalt.adapters.reach import rows_of_embedding
from fedalt.core.tree import Name, Tree, check_tree
from fedalt.data.prompts import Template, encode_prompt
from fedalt.data.records import Chat, Completion, DataError, Record, Turn
from fedalt.export.folders import BUILT_IN_REFERENCE
from fedalt.export.loading import read_config
from fedalt.export.peft_type import SLOTS, FedALTConfig, register
from fedalt.flower.client_model import client_at, served
from fedalt.methods.contract import Serving
from fedalt.models.base import BUILT_IN, Base, load_base
from fedalt.models.checks import require_known_ids
from fedalt.models.identity import differences, identity_in
from fedalt.runs.answers import Act, load_run_parts, round_to_serve, servings_now
from fedalt.runs.folder import open_run
from fedalt.runs.setup import Parts, question
from fedalt.serving.batch import Adapters

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
    if (config := client_at(path)) is not None:
        of = served(path, None)
        question(of.form, "")  # a classifier writes no text
        parts, name = of.parts, config.place.name
        model = _model(parts.base, (name, 0), of.serving, of.form, of.template)
        return Models(parts.base, parts.settings.scoring.max_new_tokens, _with_base({name: model}))
    if not (path / "run.json").exists() and (folders := exported(path)):
        return _of_exports(folders)
    parts = load_run_parts(path)
    source = _Run(path, parts)
    models = source.newer(lambda act: act())
    assert models is not None
    return Models(parts.base, parts.settings.scoring.max_new_tokens, models, source.newer)


def _with_base(models: dict[str, Model]) -> dict[str, Model]:
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
        round_, found = servings_now(self.parts, self.path, list(about), act)
        self.known = round_, sorted(about)
        template = Template(folder.facts()["data"]["template"])
        base = self.parts.base
        return _with_base(
            {
                client: _model(
                    base, (client, *map(str, self.known)), serving, about[client]["form"], template
                )
                for client, serving in found.items()
            }
        )


def _model(
    base: Base, key: tuple[Any, ...], serving: Serving, form: str, template: Template
) -> Model:
    return Model(Adapters.of(base, key, serving), form, template)


def exported(path: Path) -> dict[str, Path]:
    """The exported folders that a path stands for, by name: itself, or those right in it."""
    if (path / CONFIG_NAME).is_file():
        return {path.resolve().name: path}
    folders = (file.parent for file in sorted(path.glob(f"*/{CONFIG_NAME}")))
    # A hidden one is what an export that was killed has left.
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}


def _of_exports(folders: Mapping[str, Path]) -> Models:
    """The models of exported folders, and the longest answer of the first, in tokens.

    Raises ValueError where they are not of one base model, or were exported before servers were
    there.
    """
    register()
    configs = {name: read_config(folder) for name, folder in folders.items()}
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        if config.asked is None:
            raise ValueError(
                f"{folders[name]} does not tell how it wants to be asked: it is a classifier's, or "
                "was exported by an older version; `fedalt export` writes it anew"
            )
        if config.base_identity != first.base_identity:
            raise ValueError(
                f"{folders[name]} and {folders[first_name]} have different base models; a server "
                "has one"
            )
    reference = str(first.base_model_name_or_path)
    base = load_base(
        BUILT_IN if reference == BUILT_IN_REFERENCE else reference,
        targets=first.target_modules,
        quantise=first.quantise,  # type: ignore[arg-type]
    )
    assert base.identity is not None
    assert first.base_identity is not None
    if told := differences(identity_in(first.base_identity), base.identity):
        raise ValueError(
            f"{folders[first_name]} was trained on another base model than {reference!r} is now: "
            f"{told}"
        )
    models = {
        name: _exported(name, folders[name], config, base) for name, config in configs.items()
    }
    assert first.asked is not None
    return Models(base, int(first.asked["max_new_tokens"]), _with_base(models))


def _exported(name: str, folder: Path, config: FedALTConfig, base: Base) -> Model:
    """The model of a folder."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    tree: Tree = {}
    for key, tensor in tensors.items():
        site, _, last = key.removeprefix("base_model.model.").partition(f".{SLOTS}.")
        slot, _, factor = last.rpartition("_")
        tree[Name(site, slot, factor)] = tensor
    plan, asked = config.plan(), config.asked
    check_tree(tree, plan.shapes(base.adapted.sites), what=str(file))
    assert asked is not None
    serving, template = Serving(plan, tree), Template(str(asked["template"]))
    return _model(base, (name,), serving, str(asked["form"]), template)
