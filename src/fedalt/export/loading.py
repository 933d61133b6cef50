"""Loading an exported serving as a transformers model."""

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch.nn import ParameterDict
from transformers import PreTrainedModel

from fedalt.adapters.last_token import pick_last_tokens
from fedalt.export.folders import BUILT_IN_REFERENCE
from fedalt.export.peft_type import SLOTS, FedALTConfig, FedALTLayer, Kind, register
from fedalt.models.base import BUILT_IN, ModelError, load_network, location
from fedalt.models.config import network_config, set_padding
from fedalt.models.identity import differences, identify, identity_in
from fedalt.models.weights import Loaded, tensors_of_head


def load(path: str | Path, *, device: str | None = None) -> PeftModel:
    """The model in a folder that `export_personal` wrote, ready to `generate` or to classify.

    It lies on the GPU if there is one. On a CPU it is float32, on a GPU it keeps the base model's
    dtype. `AutoTokenizer.from_pretrained(path)` gives the tokenizer. Raises ValueError, also where
    the base model is not the one that was trained on.
    """
    register()
    folder = Path(path)
    config = read_config(folder)
    keys = _keys_in(folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = _load_base(config, folder, device)
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{folder} does not fit its base model {config.base_model_name_or_path!r}: "
            f"{_in_short(error)}"
        ) from error
    # PEFT itself only warns of a tensor that is missing, and ignores one that has no place.
    if different := sorted(keys ^ _keys_of(model)):
        raise ValueError(
            f"{folder} does not fit its base model {config.base_model_name_or_path!r}: "
            f"{len(different)} tensors are on one side only, first {different[0]}"
        )
    pick_last_tokens(model.base_model.model)
    return model.eval()


def read_config(folder: Path) -> FedALTConfig:
    """The configuration of an exported folder. Raises ValueError."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} to load")
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{folder} is no exported model: it has no {CONFIG_NAME}")
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
        kind = raw.get("peft_type")
        if kind == Kind.FEDALT:
            config: FedALTConfig = PeftConfig.from_pretrained(str(folder))
            return config
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {_in_short(error)}") from error
    raise ValueError(
        f"{folder} holds an adapter of PEFT's type {kind!r}, but only {str(Kind.FEDALT)!r} is a "
        "whole model; peft.PeftModel.from_pretrained loads others onto their base model"
    )


def _keys_in(folder: Path) -> set[str]:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{folder} is no exported model: it has no {SAFETENSORS_WEIGHTS_NAME}")
    try:
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {_in_short(error)}") from error


def _keys_of(model: PeftModel) -> set[str]:
    keys: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, FedALTLayer):
            factors = cast(ParameterDict, module.fedalt_slots["default"])
            keys.update(f"{path}.{SLOTS}.{key}" for key in factors)
        elif isinstance(module, ModulesToSaveWrapper):
            keys.update(f"{path}.{key}" for key in module.adapter_state_dict_load_map("default"))
    return keys


def _load_base(config: FedALTConfig, folder: Path, device: str) -> PreTrainedModel:
    """The base model as the run loaded it; a classifier's head is there to be replaced."""
    reference = config.base_model_name_or_path
    name = BUILT_IN if reference == BUILT_IN_REFERENCE else str(reference)
    labels = config.labels or ()
    try:
        place = location(name)
        about = network_config(name, place, labels)
        set_padding(about, config.pad_token_id)
        loaded, _ = load_network(
            name,
            place,
            about,
            labels=labels,
            quantise=cast(Any, config.quantise),
            device=device,
        )
    except ModelError as error:
        raise ValueError(
            f"cannot load {reference!r}, the base model of {folder}: {error}; if it lies elsewhere "
            "now, load it from there and give it to peft.PeftModel.from_pretrained"
        ) from error
    _require_same(loaded, config, folder)
    return loaded.model


def _require_same(loaded: Loaded, config: FedALTConfig, folder: Path) -> None:
    """Refuse another network than the adapter was trained on; the folder has a tokenizer itself."""
    if config.base_identity is None:
        raise ValueError(f"{folder / CONFIG_NAME} does not tell what its base model is known by")
    try:
        then = identity_in(config.base_identity)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_NAME} cannot be read: {_in_short(error)}") from error
    names = tensors_of_head(loaded.model, loaded.fresh).keys() | loaded.fresh
    now = identify(loaded.model, labels=config.labels or (), without=names)
    then = replace(
        then,
        weights={name: digest for name, digest in then.weights.items() if name not in names},
        tokenizer={},
        template="",
    )
    if told := differences(then, now):
        raise ValueError(
            f"{folder} was trained on another base model than {config.base_model_name_or_path!r} "
            f"is now: {told}"
        )


def _in_short(error: Exception) -> str:
    """One line: some of these errors list every tensor of the model."""
    return textwrap.shorten(str(error), 300)
