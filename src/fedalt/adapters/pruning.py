"""The MLP of the last block for those tokens alone whose logits count.

After the last attention nothing looks from one token at another: what the last MLP makes of a token
without a label is never read. Of most texts only an answer's tokens carry a label.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedalt.adapters.packing import agree


@dataclass(frozen=True)
class Labelled:
    """The tokens whose logits count: `rows` (n,) of the flattened batch, client by client.

    `spans` are their numbers for each client, None where these are equal.
    """

    rows: Tensor
    spans: tuple[int, ...] | None


def prune(
    mlp: nn.Module,
    begin: Callable[[], Tensor | None],
    end: Callable[[], None] = lambda: None,
) -> Sequence[RemovableHandle]:
    """Let an MLP compute some rows of its flattened input, and zeros for the others.

    Before each of its calls `begin` is asked which rows, (n,), or None for all of them; after a
    call with rows comes `end`.
    """
    asked: list[tuple[Tensor, torch.Size] | None] = []

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        rows = begin()
        if rows is None:
            asked.append(None)
            return inputs
        asked.append((rows, hidden.shape))
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)[None], *rest)

    def place(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
        if (whole := asked.pop()) is None:
            return out
        end()
        rows, shape = whole
        zeros = out.new_zeros(shape[:-1].numel(), shape[-1])
        return zeros.index_copy(0, rows, out[0]).reshape(shape)

    return mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(place)


def last_mlp(model: PreTrainedModel) -> nn.Module | None:
    """The MLP of a causal model's last block, if the model's logits bear it; it is tried."""
    blocks = [each for each in model.base_model.children() if isinstance(each, nn.ModuleList)]
    mlp = getattr(blocks[-1][-1], "mlp", None) if blocks else None
    if not isinstance(mlp, nn.Module) or model.get_output_embeddings() is None:
        return None
    ids = (
        torch.arange(1, 9, device=model.device).reshape(2, 4)
        % model.config.get_text_config().vocab_size
    )
    rows = torch.tensor([1, 2, 7], device=model.device)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
        handles = prune(mlp, lambda: rows)
        try:
            some = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None
        finally:
            for handle in handles:
                handle.remove()
    return mlp if agree(some, whole) else None
