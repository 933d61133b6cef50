"""What lies in the place of a base model: a model, or something else that is taken for one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import transformers
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from fedalt.models.errors import ModelError

_EXPECTED: Final = (
    "expected a folder with config.json, the weights as safetensors, and tokenizer.json"
)
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def require_folder_of_model(folder: Path, name: str) -> None:
    """Raise ModelError for a file or folder that is no whole model, and say what it is."""
    if folder.is_file():
        kind = "a single file of weights" if folder.suffix in _WEIGHTS else "a file"
        raise ModelError(f"{name!r} is {kind}; {_EXPECTED}")
    if (folder / "adapter_config.json").is_file():
        base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
        on = f" of the base model {base!r}: give that one" if base else ""
        raise ModelError(f"{name!r} holds an adapter{on}; {_EXPECTED}")
    if (folder / "config.json").is_file():
        return
    holds = next(
        (
            what
            for pattern, what in (
                ("*.gguf", "a GGUF file: give that file itself"),
                ("run.json", "a run of fedalt"),
                ("consolidated*.pth", "weights in Meta's own layout"),
                ("params.json", "weights in another layout"),
                ("*.safetensors", "weights alone"),
                ("*.bin", "weights alone"),
            )
            if any(folder.glob(pattern))
        ),
        None,
    )
    below = sorted(path.parent.name for path in folder.glob("*/config.json"))
    holds = f", but {holds}" if holds else ""
    holds += f"; its folders {', '.join(below[:5])} have one" if below else ""
    raise ModelError(f"the model folder {name!r} has no config.json{holds}; {_EXPECTED}")


def _read(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what it is has been said already, only its base is not known
        return {}
    return value if isinstance(value, dict) else {}


def require_no_own_config_code(place: str, name: str) -> None:
    """Raise ModelError where a model type is known only to code that comes with the model."""
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(place)
    except Exception:  # a foreign file; loading the model says what is wrong with it
        return
    own = raw.get("auto_map") if isinstance(raw, dict) else None
    if isinstance(own, dict) and own and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ModelError(_own_code(name, own, "config.json"))


def require_no_own_tokenizer_code(place: str, name: str) -> None:
    """Raise ModelError where a tokenizer's class is defined by code that comes with it."""
    try:
        raw = get_tokenizer_config(place)
    except Exception:  # as above; loading the tokenizer says what is wrong with it
        return
    own = raw.get("auto_map")
    own = own if isinstance(own, dict) else {"AutoTokenizer": own}
    if own.get("AutoTokenizer") and not hasattr(transformers, str(raw.get("tokenizer_class"))):
        raise ModelError(_own_code(name, own, "tokenizer_config.json"))


def _own_code(name: str, own: Mapping[str, Any], file: str) -> str:
    values = (value if isinstance(value, list) else [value] for value in own.values())
    named = [str(name) for names in values for name in names if name]
    return (
        f"the model {name!r} needs code of its own ({', '.join(named)} in auto_map of {file}), "
        "and fedalt runs no code that comes with a model; expected an architecture that "
        "transformers itself knows"
    )
