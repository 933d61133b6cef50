"""The base model and its tokenizer, from a folder, a hub id, or the one that comes built in."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.reach import positions_of, rows_of_embedding
from fedalt.core.settings import BUILT_IN, BUILT_IN_FOLDER, PACKAGED, Quantise
from fedalt.core.tree import Name
from fedalt.models.checks import (
    bears_padding_before,
    note_on_padding,
    require_causal,
    require_reads_texts,
    require_room_for_tokens,
)
from fedalt.models.config import network_config, own_labels, set_labels, set_padding
from fedalt.models.errors import ModelError, in_short
from fedalt.models.folder import require_folder_of_model, require_no_own_tokenizer_code
from fedalt.models.gguf import SUFFIX, GGUFError, converted
from fedalt.models.identity import Identity, identify
from fedalt.models.weights import Loaded, load_weights, notes_on_head, own_head, tensors_of_head

__all__ = [
    "BUILT_IN",
    "PACKAGED",
    "Base",
    "ModelError",
    "gguf_file",
    "load_base",
    "load_tokenizer",
    "location",
]

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Base:
    """A frozen base model ready to be bound, its tokenizer, and what identifies it.

    `fingerprint` is the short form of `identity`, which tells what differs. `given` are the tensors
    of a classifier's head that begin as the checkpoint has them, `notes` sentences for the user.
    `bears_padding_before`: whether prompts of different lengths can be continued in one batch.
    """

    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    identity: Identity | None = None
    given: Mapping[Name, Tensor] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    quantise: Quantise | None = None
    bears_padding_before: bool = True

    @property
    def pad_id(self) -> int:
        """The token that fills up a batch; it carries no loss and no attention."""
        known = rows_of_embedding(self.adapted.model) or inf
        # Some tokenizers have got a token for it that the model has no embedding of.
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in tokens if token is not None and token < known)

    @cached_property
    def positions(self) -> int:
        """The most tokens of one text that the model can number, or that its tokenizer says."""
        own = positions_of(self.adapted.model)
        said = int(self.tokenizer.model_max_length)  # huge where the tokenizer says nothing
        return said if own is None else min(own, said)


def load_base(
    name: str,
    *,
    labels: Sequence[str] = (),
    targets: str | Sequence[str] | None = None,
    quantise: Quantise | None = None,
    device: str | None = None,
) -> Base:
    """Load a base model and wrap its layers.

    `name` is a folder, a hub id, "tiny" or a name of PACKAGED. With `labels` the model becomes a
    sequence classifier for them; its head begins as the checkpoint's own where that was trained for
    the same labels, else anew. On a CPU the weights are float32; on a GPU they keep their own
    dtype. The model's own dropout is off: fedalt's adapters bring theirs, seeded.
    No code that comes with a model is run. Raises ModelError where a tensor is
    missing or left over, and for a model that sees what follows.
    """
    place = location(name)
    config = network_config(name, place, labels)
    tokenizer = load_tokenizer(name)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    set_padding(config, pad)
    loaded, own = load_network(name, place, config, labels=labels, quantise=quantise, device=device)
    model, fresh = loaded.model, loaded.fresh
    require_room_for_tokens(tokenizer, name, rows_of_embedding(model))
    model.config.use_cache = False
    if not labels:
        # What a model's card sets for sampling would only draw warnings from whoever decodes it
        # greedily without our own settings, which take nothing from the card but its end tokens.
        model.generation_config.update(
            do_sample=False, temperature=None, top_p=None, top_k=None, use_cache=True
        )
    notes_on_texts: tuple[str, ...] = ()
    try:
        if labels:
            notes_on_texts = note_on_padding(model)
            require_reads_texts(model, tokenizer)
    except ValueError as error:
        raise ModelError(f"cannot use the model {name!r}: {in_short(error)}") from error
    before = bool(labels) or bears_padding_before(model)
    given = own_head(model, fresh, own, labels)
    identity = identify(model, tokenizer, labels=labels, without=drawn(loaded, kept=bool(given)))
    notes = (*notes_on_head(model, fresh, (own, labels), kept=bool(given)), *notes_on_texts)
    try:
        adapted = AdaptedModel(model, targets, fresh=fresh)
    except ValueError as error:
        raise ModelError(f"the model {name!r}: {error}") from error
    return Base(adapted, tokenizer, name, identity.short, identity, given, notes, quantise, before)


def load_network(
    name: str,
    place: str,
    config: Any,
    *,
    labels: Sequence[str],
    quantise: Quantise | None = None,
    device: str | None = None,
) -> tuple[Loaded, tuple[str, ...]]:
    """A base model's network before it is wrapped, and the labels that its checkpoint is for.

    Raises ModelError, as `load_base`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _require_device(device)
    own = own_labels(config) if labels else ()
    options: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32 if device == "cpu" else "auto",
    }
    if quantise:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantise == "8bit", load_in_4bit=quantise == "4bit"
        )
    if labels:
        set_labels(config, labels)
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    loaded = load_weights(kind, place, name, options)
    model = loaded.model
    if not quantise:
        model.to(device)
    if not labels:
        require_causal(model.eval(), name)
    return loaded, own


def drawn(loaded: Loaded, *, kept: bool) -> frozenset[str]:
    """The tensors of a model that are no part of what it is known by: a head that begins anew."""
    return (
        loaded.fresh if kept else loaded.fresh | tensors_of_head(loaded.model, loaded.fresh).keys()
    )


def location(name: str) -> str:
    """The folder of a model's name, or the name itself where it is a hub id. Raises ModelError."""
    if name == BUILT_IN:
        return str(BUILT_IN_FOLDER)
    if (file := gguf_file(name)) is not None:
        try:
            return str(converted(file, lambda text: print(text, file=sys.stderr, flush=True)))
        except GGUFError as error:
            raise ModelError(str(error)) from error
    folder = _named(name)
    if folder.exists():
        require_folder_of_model(folder, name)
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"there is no model folder {name!r}")
    return name


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a model's name stands for; None for any other. Raises ModelError."""
    file = _named(name)
    return file if file.suffix == SUFFIX and (name in PACKAGED or file.is_file()) else None


def _named(name: str) -> Path:
    try:
        return _packaged(name) if name in PACKAGED else Path(name).expanduser()
    except RuntimeError:
        raise ModelError(f"there is no model {name!r}: no such user's home") from None


def _packaged(name: str) -> Path:
    """Where the model of a package lies; the package is not imported."""
    model = PACKAGED[name]
    spec = find_spec(model.module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the model {name!r} comes in a package that is not installed; "
            f"`{model.install}` installs it"
        )
    return Path(spec.origin).parent / model.place


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for looking at data without the weights. Raises ModelError."""
    place = location(name)
    if Path(place).is_dir() and not any(any(Path(place).glob(name)) for name in _TOKENIZER_FILES):
        raise ModelError(
            f"the model folder {name!r} has no tokenizer; expected tokenizer.json and "
            "tokenizer_config.json beside the weights"
        )
    require_no_own_tokenizer_code(place, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # a tokenizer's files may hold anything
        raise ModelError(
            f"cannot load a tokenizer for the model {name!r}: {in_short(error)}; expected "
            "tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if len(tokenizer) == 0 or not tokenizer("a b c", add_special_tokens=False)["input_ids"]:
        raise ModelError(
            f"the model {name!r} has no usable tokenizer; expected tokenizer.json and "
            "tokenizer_config.json beside the weights"
        )
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no end-of-text token")
    return tokenizer


def require_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ModelError where a tokenizer has more tokens than its model's config.json tells of."""
    config = network_config(name, location(name), ("any",))
    require_room_for_tokens(tokenizer, name, getattr(config.get_text_config(), "vocab_size", None))


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot use the device {device!r}: {in_short(error)}") from error
