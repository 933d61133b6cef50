"""A client's model as a LoRA in a GGUF file, which llama.cpp loads beside the base model.

Names and order are those that llama.cpp gives to the weights of a base model: its queries and keys
of the Llama family turn neighbouring pairs of numbers, those of transformers two halves of a head.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from torch import Tensor

from fedalt.adapters.plan import Slot
from fedalt.core.tree import Name
from fedalt.export.folders import new_folder
from fedalt.methods.contract import Serving
from fedalt.models.base import Base

FILE: Final = "adapter.gguf"
# By transformers' model type: what llama.cpp calls it, and whether it reorders queries and keys.
_ARCHITECTURES: Final[Mapping[str, tuple[str, bool]]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}


def export_gguf(serving: Serving, base: Base, folder: Path, *, readme: str = "") -> Path:
    """Write the file; the serving has one slot of a fixed weight (`fixed.Fixed`).

    A is (rank, d_in) and B (d_out, rank), float32, under the name of the layer's weight; what is
    added is alpha / rank times B A. Raises ValueError, see `require_gguf`.
    """
    architecture, reordered = require_gguf(base)
    (slot,) = serving.plan.slots
    tensors = _named(serving, slot, base, architecture, reordered=reordered)
    with new_folder(folder, readme) as unfinished:
        _write(unfinished / FILE, architecture, slot.alpha, tensors)
    return folder


def require_gguf(base: Base) -> tuple[str, bool]:
    """What llama.cpp calls a base model's architecture, and whether it reorders queries and keys.

    Raises ValueError for a base model that it is not known to name the same, and without the
    package gguf.
    """
    model_type = base.adapted.model.config.model_type
    known = _ARCHITECTURES.get(model_type)
    if known is None or base.adapted.heads:
        what = "a classifier" if base.adapted.heads else f"a {model_type} model"
        raise ValueError(
            f"--format gguf cannot write an adapter of {what}; expected a causal model of type "
            f"{', '.join(_ARCHITECTURES)}"
        )
    if find_spec("gguf") is None:
        raise ValueError("writing GGUF needs a package: `pip install 'fedalt[gguf]'`")
    return known


def _named(
    serving: Serving, slot: Slot, base: Base, architecture: str, *, reordered: bool
) -> dict[str, Tensor]:
    """The factors by llama.cpp's names."""
    import gguf

    config = base.adapted.model.config
    (kind,) = (at for at, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors: dict[str, Tensor] = {}
    for site in base.adapted.sites:
        if (name := names.get_name(site)) is None:
            raise ValueError(f"--format gguf: llama.cpp has no name for {site} of {architecture}")
        a, b = (serving.tree[Name(site, slot.name, factor)].float().cpu() for factor in "AB")
        if reordered and (count := heads.get(site.rpartition(".")[2])) is not None:
            b = in_pairs(b, count)
        tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}
    return tensors


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * d, n) with each head's row i + d/2 directly behind its row i."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def _write(file: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
