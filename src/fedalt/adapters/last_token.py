"""Classifiers that score every token and answer with the last one: which one that is.

Transformers looks for the last token that is not the padding id. Where tokenizer and model name
different ids, or where a text ends with that token, that is not its last one, and a text's logits
depend on the texts beside it. The attention mask knows better.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_HEADS = ("score", "classifier")


def pick_last_tokens(model: PreTrainedModel) -> None:
    """Let a classifier answer with the last token that its attention mask shows.

    Without a mask that is the last of the row. Changes nothing for a model whose head sees one
    vector of each text, nor for one that answers with a mean over tokens.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return
    head = next((getattr(model, name) for name in _HEADS if hasattr(model, name)), None)
    if head is None:
        return
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], out: Any) -> None:
        seen[:] = [out] if isinstance(out, Tensor) and out.dim() == 3 else []

    def pick(_: nn.Module, args: Sequence[Any], named: Mapping[str, Any], out: Any) -> Any:
        if not seen or not isinstance(getattr(out, "logits", None), Tensor):
            return out
        every = seen.pop()
        mask = named.get("attention_mask", args[1] if len(args) > 1 else None)
        rows = torch.arange(every.shape[0], device=every.device)
        last: Tensor | int = every.shape[1] - 1
        if isinstance(mask, Tensor) and mask.dim() == 2:
            places = torch.arange(every.shape[1], device=every.device)
            last = (places * (mask[:, -every.shape[1] :] != 0)).argmax(-1)
        of_tokens = (every == out.logits[:, None]).all(-1).any(-1)  # of EuroBERT's mean: of none
        out.logits = torch.where(of_tokens.all(), every[rows, last], out.logits)
        if getattr(out, "loss", None) is not None and "labels" in named:
            out.loss = model.loss_function(
                logits=every,
                labels=named["labels"],
                pooled_logits=out.logits,
                config=model.config,
            )
        return out

    head.register_forward_hook(keep)
    model.register_forward_hook(pick, with_kwargs=True)
