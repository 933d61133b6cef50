"""A client's model as a folder of transformers: its adapter merged into the base weights."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedalt.core.tree import Name
from fedalt.export.folders import new_folder
from fedalt.methods.contract import Serving
from fedalt.models.base import Base, load_network, location
from fedalt.models.config import network_config


@torch.no_grad()
def export_merged(serving: Serving, base: Base, folder: Path, *, readme: str = "") -> Path:
    """Write network and tokenizer; the serving has one slot of a fixed weight (`fixed.Fixed`).

    Raises ValueError, see `require_mergeable`, and for a folder that holds something.
    """
    require_mergeable(base)
    place = location(base.name)
    config = network_config(base.name, place, ())
    loaded, _ = load_network(base.name, place, config, labels=(), device="cpu")
    (slot,) = serving.plan.slots
    for site in base.adapted.sites:
        layer = loaded.model.get_submodule(site)
        a, b = (serving.tree[Name(site, slot.name, factor)].float().cpu() for factor in "AB")
        added = slot.scaling * (b @ a)
        weight = cast(Tensor, layer.weight)
        weight += (added.T if isinstance(layer, Conv1D) else added).to(weight.dtype)
    with new_folder(folder, readme) as unfinished:
        loaded.model.save_pretrained(unfinished)
        base.tokenizer.save_pretrained(unfinished)
    return folder


def require_mergeable(base: Base) -> None:
    """Raise ValueError for a quantised base model and for a classifier."""
    if base.quantise:
        raise ValueError(
            f"the base model is loaded with {base.quantise} a weight, which no adapter can be "
            "merged into; --format peft writes it beside the base model"
        )
    if base.adapted.heads:
        raise ValueError("a classifier cannot be written merged; --format fedalt writes it whole")
