"""Tiny random models as folders, and what can be done to such a folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bases import letters
from safetensors.torch import load_file, save_file
from tiny import VOCAB
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved(folder: Path, kind: type[PreTrainedModel], config: PretrainedConfig) -> Path:
    """A random model with a tokenizer of letters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """Replace the tensors of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(dict(change(tensors)), file, metadata={"format": "pt"})
    return folder


def edit_json(folder: Path, name: str, **changes: Any) -> Path:
    """Set keys of one of a folder's JSON files; None takes one out."""
    file = folder / name
    value = json.loads(file.read_text())
    for key, new in changes.items():
        if new is None:
            value.pop(key, None)
        else:
            value[key] = new
    file.write_text(json.dumps(value))
    return folder
