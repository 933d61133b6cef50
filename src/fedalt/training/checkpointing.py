"""Gradient checkpointing: a block keeps its input alone, and runs again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


def can_checkpoint(model: PreTrainedModel) -> bool:
    """Whether blocks of this model know how to run again."""
    return bool(model.supports_gradient_checkpointing) and any(
        hasattr(module, "gradient_checkpointing") for module in model.modules()
    )


@contextmanager
def checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Keep only each block's input for the backward pass and run the block again there."""
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # It also has the embedding's output require a gradient, by one more hook every time. Adapters
    # require theirs themselves, and checkpoints that are not reentrant need no more.
    model.disable_input_require_grads()
    # transformers checkpoints in training mode only. Whatever else that mode would change in a
    # block, such as a router that then chooses experts at random, stays as in evaluation.
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
