"""Which texts a model reads, and which layers they go through: seen while it reads some."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Odd numbers: what else a layer may see, such as a table of positions, has hardly as many rows.
_TEXTS, _TOKENS = 3, 7
# What models call a table with a row for each position.
_TABLES: Final = ("position_embeddings", "embed_positions", "wpe", "position_embedding")


@dataclass
class _Seen:
    """What came by while a model read texts: the modules that ran, and of linear layers how.

    `whole` tells of a layer whether every call was about all tokens of all texts, in order;
    `odd` are those that gave something else than a product.
    """

    ran: set[str] = field(default_factory=set)
    whole: dict[str, bool] = field(default_factory=dict)
    odd: set[str] = field(default_factory=set)

    def hear(
        self, path: str, linear: bool, layer: nn.Module, inputs: tuple[Any, ...], out: Any
    ) -> None:
        self.ran.add(path)
        if not linear:
            return
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not _is_product(layer, x, out) or len(inputs) != 1:
            self.odd.add(path)
        else:
            rows = x.shape[:-1].numel()
            # A pooler sees one row of each text; by chance an expert in a block sees as many.
            texts = x.shape[0] == _TEXTS and (x.dim() > 2 or not is_in_a_block(path))
            # Where tokens come first, (tokens, texts, d) as in XLNet, rows are of several clients.
            flat = x.dim() == 2 and rows == _TEXTS * _TOKENS
            whole = x.dim() > 1 and (texts or flat)
            self.whole[path] = whole and self.whole.get(path, True)


def plain_layers(model: PreTrainedModel, linear: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Of linear layers by path those that turn what a text becomes into a product, and how.

    The value is True where a layer always sees all tokens of all texts in their order: then several
    clients can share a pass. An expert that gets the tokens sent to it sees some of them. A layer
    that no text reaches, such as one of a vision tower, is left out. Raises ValueError for a model
    that reads no text by itself.
    """
    seen = _Seen()
    handles = [
        module.register_forward_hook(partial(seen.hear, path, path in linear))
        for path, module in model.named_modules()
    ]
    try:
        read(model, short_texts(model, _TEXTS, _TOKENS))
    finally:
        for handle in handles:
            handle.remove()
    plain = {}
    for path in linear:
        if path in seen.whole and path not in seen.odd:
            plain[path] = seen.whole[path]
        elif path not in seen.ran and _is_one_of_many(model, path, seen.ran):
            plain[path] = False
    return plain


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of a model for texts (texts, tokens). Raises ValueError where it reads none.

    `mask` is 0 where padding stands; without one there is none.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    known = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask, **known).logits
    except Exception as error:  # a foreign network may raise anything
        raise ValueError(
            f"this {model.config.model_type} model ({type(model).__name__}) does not read a text "
            f"by itself: {type(error).__name__}: {error}"
        ) from error
    return logits


def short_texts(model: PreTrainedModel, texts: int, tokens: int) -> Tensor:
    """Ids (texts, tokens) of which neighbours differ; the last one ends a text."""
    config = model.config.get_text_config()
    sizes = rows_of_embedding(model), getattr(config, "vocab_size", None)
    size = min(filter(None, sizes), default=256)
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) and end else end
    pad = getattr(config, "pad_token_id", None)
    usual = [token for token in range(min(size, 1024)) if token not in (end, pad)]
    usual = usual[: texts * tokens * 7 : 7]
    ids = torch.tensor([usual[at % len(usual)] for at in range(texts * tokens)])
    if isinstance(end, int) and 0 <= end < size:  # some classifiers look for it
        ids[tokens - 1 :: tokens] = end
    return ids.reshape(texts, tokens).to(model.device)


def rows_of_embedding(model: PreTrainedModel) -> int | None:
    """How many tokens a model can read; None where it has no table of them."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens of one text; None for a model that sets no bound.

    Where positions are looked up in a table its rows count, not what the configuration says: those
    up to a padding id stand for no position, nor do rows that are skipped. Tables of other parts,
    such as a vision tower's, number no text.
    """
    config = model.config.get_text_config(decoder=True)
    said = [getattr(config, "max_position_embeddings", None)]
    texts = _place_of_texts(model)
    for path, module in model.named_modules():
        if not path.startswith(texts):
            continue
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES:
            skipped = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                skipped = max(skipped, module.padding_idx + 1)
            said.append(module.num_embeddings - skipped)
    return min((length for length in said if isinstance(length, int) and length > 0), default=None)


def _place_of_texts(model: PreTrainedModel) -> str:
    """How the paths begin of what lies beside the table of tokens; "" where there is none."""
    try:
        tokens = model.get_input_embeddings()
    except NotImplementedError:
        return ""
    path = next((path for path, module in model.named_modules() if module is tokens), "")
    return path.rpartition(".")[0]


def is_in_a_block(path: str) -> bool:
    """Whether a layer is part of one of the network's numbered blocks, which none may lack."""
    return any(part.isdecimal() for part in path.split("."))


def _is_one_of_many(model: nn.Module, path: str, ran: set[str]) -> bool:
    """Whether a layer that did not run is an alternative to one that did, such as an expert."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        above = ".".join(parts[:end])
        if above and above not in ran:
            continue
        child = ".".join(parts[: end + 1])
        inside = any(path.startswith(f"{child}.") for path in ran)
        return isinstance(model.get_submodule(child), nn.ModuleList) and inside
    return False


def _is_product(layer: nn.Module, x: Tensor, out: Any) -> bool:
    """Whether an output (..., d_out) can be that of a linear layer for its input (..., d_in)."""
    width = int(cast(int, layer.nf if isinstance(layer, Conv1D) else layer.out_features))
    return isinstance(out, Tensor) and tuple(out.shape) == (*x.shape[:-1], width)
