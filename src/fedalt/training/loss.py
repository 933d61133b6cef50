"""The loss of a bound model on a batch, with logits only where a label is."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from fedalt.training.batches import Batch


def token_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross entropy of every target, (n,), float32: answer tokens, or labels of a classifier."""
    with _autocast(batch.ids.device):
        if batch.predicting is None:
            logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        else:
            # Padded on the right under a causal mask, no real token sees padding: no mask is
            # needed, and attention kernels are fastest without one. Packed, none is padded.
            placed = {"position_ids": batch.packing.positions} if batch.packing else {}
            with _only_rows(model, batch.predicting):
                logits = model(input_ids=batch.ids, use_cache=False, **placed).logits[0]
    return functional.cross_entropy(logits.float(), batch.targets, reduction="none")


def client_means(losses: Tensor, batch: Batch, clients: int) -> Tensor:
    """Mean loss of each client's targets, (clients,)."""
    zeros = losses.new_zeros(clients)
    totals = zeros.index_add(0, batch.owners, losses)
    return totals / zeros.index_add(0, batch.owners, torch.ones_like(losses)).clamp(min=1)


@contextmanager
def _only_rows(model: PreTrainedModel, rows: Tensor) -> Iterator[None]:
    """Let the output embedding see only the given rows: the full logits never exist.

    A hook on the embedding, not the model's own `logits_to_keep`, because that keeps the same
    positions of every example, and because what a model does to its logits afterwards still holds.
    """

    def pick(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, rows], *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _autocast(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
