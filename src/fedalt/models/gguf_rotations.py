"""RoPE scaling in a GGUF file, which transformers leaves aside when it unpacks one.

Llama 3.1 and its kin divide each frequency by a factor of its own, `rope_freqs.weight`.
"""

from copy import deepcopy
from typing import Any, Final

import torch

_FACTORS: Final = "rope_freqs.weight"
# The settings of all such models but for the largest factor.
_LLAMA3: Final = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rotations_of(reader: Any, config: Any) -> dict[str, Any] | None:
    """The `rope_parameters` with which transformers computes what the file means; None: as read.

    `reader` is a `gguf.GGUFReader`, `config` what transformers has read of the file. Raises
    ValueError for rotations that it cannot be given.
    """
    for key, field in reader.fields.items():
        plain = {".rope.scaling.type": "none", ".rope.scale_linear": 1.0}
        for end, usual in plain.items():
            if key.endswith(end) and field.contents() != usual:
                raise ValueError(f"its {key} is {field.contents()!r}, expected {usual!r} or none")
    scaled = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_")}
    if not scaled:
        return None
    if set(scaled) != {_FACTORS}:
        raise ValueError(f"it has {min(scaled)}, which transformers cannot use")
    factors = torch.tensor(scaled[_FACTORS].data.copy()).float()
    wanted = {**config.rope_parameters, **_LLAMA3, "factor": float(factors.max())}
    if not torch.allclose(_factors(config, wanted, len(factors)), factors, rtol=1e-3):
        raise ValueError(f"its {_FACTORS} is not that of Llama 3.1, which transformers can use")
    return wanted


def _factors(config: Any, rotations: dict[str, Any], count: int) -> torch.Tensor:
    """What these rotations divide the plain frequencies by; NaN where there are not so many."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tried = deepcopy(config)
    tried.rope_parameters = rotations
    frequencies: torch.Tensor = ROPE_INIT_FUNCTIONS["llama3"](tried, torch.device("cpu"))[0]
    if len(frequencies) != count:
        return torch.full((count,), torch.nan)
    plain = torch.pow(float(rotations["rope_theta"]), -torch.arange(count) / count)
    return plain / frequencies
