"""The loss of a bound model on a batch, with logits only where a label is."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedalt.training.batches import Batch

_ROWS: Final = 16  # of logits at a time on a CPU: what comes between then stays in its caches


def token_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross entropy of every target, (n,), float32: answer tokens, or labels of a classifier."""
    with autocast(batch.ids.device):
        if batch.predicting is None:
            logits = label_logits(model, batch)
        else:
            # Padded on the right under a causal mask, no real token sees padding: no mask is
            # needed, and attention kernels are fastest without one. Packed, none is padded.
            placed = {"position_ids": batch.packing.positions} if batch.packing else {}
            with _only_rows(model, batch.predicting):
                logits = model(input_ids=batch.ids, use_cache=False, **placed).logits
            logits = logits.squeeze(0)  # not [0]: its gradient would be a copy into zeros
    return cross_entropy(logits, batch.targets)


def label_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A classifier's logits for each text of a batch, (rows, labels).

    The model is told of pairs what the tokenizer tells, if it has a use for it, as it is by whoever
    gives it all of the tokenizer's output.
    """
    more = segments_for(model, batch.segments)
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, **more).logits
    return logits


def segments_for(model: PreTrainedModel, segments: Tensor | None) -> dict[str, Tensor]:
    """What says which text of a pair each token belongs to, for a model that has a use for it."""
    if segments is None or "token_type_ids" not in signature(model.forward).parameters:
        return {}
    kinds = getattr(model.config, "type_vocab_size", None)
    fits = not isinstance(kinds, int) or int(segments.max()) < kinds
    return {"token_type_ids": segments} if fits else {}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each row of logits (n, classes) and its target (n,), in float32: (n,).

    Torch's, with half as many tensors of the logits' size: they are the largest of a step, and
    coming by their memory takes longer than computing in it. Differentiable twice.
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        rows = _ROWS if logits.device.type == "cpu" else max(1, len(logits))
        totals = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])
        return totals - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        gradient = grads[0][:, None]
        shares = logits.softmax(-1, dtype=torch.float32)
        out = shares * gradient if torch.is_grad_enabled() else shares.mul_(gradient)
        return out.scatter_add_(1, targets[:, None], -gradient).to(logits.dtype), None


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


def autocast(device: torch.device) -> Any:
    """The precision of products on a device."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
