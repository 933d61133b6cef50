"""Names of an adapter's tensors that PEFT reads as exactly these layers.

For some architectures PEFT renames what it reads, as transformers does with checkpoints of an older
layout, and takes a name of today for one of those. So the names are read once before they count.
"""

from collections.abc import Iterator, Mapping

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    get_model_conversion_mapping,
)
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

PREFIX = "base_model.model."


def as_peft_reads(
    model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors under names which PEFT reads as theirs; mostly these are the same.

    Raises ValueError where there are none.
    """
    named = {PREFIX + key: tensor for key, tensor in tensors.items()}
    read = _read(model, config, named)
    readable = {}
    for key, tensor in named.items():
        if _is(read.get(key), tensor):
            readable[key] = tensor
            continue
        other = next(
            (
                older
                for older in _older_names(model, key)
                if _is(_read(model, config, {older: tensor}).get(key), tensor)
            ),
            None,
        )
        if other is None:
            raise ValueError(
                f"PEFT reads {key.removeprefix(PREFIX)!r} of a {model.config.model_type} model by "
                "another name, so no plain LoRA can hold this adapter; --format fedalt writes all "
                "of the client's model, which fedalt.load reads"
            )
        readable[other] = tensor
    return {key.removeprefix(PREFIX): tensor for key, tensor in readable.items()}


def _read(
    model: PreTrainedModel, config: LoraConfig, named: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    try:
        read: Mapping[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(
            model, config, dict(named)
        )
    except (ValueError, RuntimeError, KeyError, IndexError):  # it wants parts that are not there
        return {}
    return read


def _older_names(model: PreTrainedModel, key: str) -> Iterator[str]:
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightRenaming):
            older, matched = conversion.reverse_transform().rename_source_key(key)
            if matched is not None and older != key:
                yield older


def _is(read: Tensor | None, tensor: Tensor) -> bool:
    return read is not None and read.shape == tensor.shape and bool((read == tensor).all())
