"""Keys and values of texts that go on: written in place, and reordered only where beams differ.

Transformers' own cache copies all of it for every new token, and once more with beams: on a CPU
that is half of the time that writing an answer takes.
"""

from inspect import signature

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer's `keys` and `values`: the filled part of two buffers.

    (rows, heads, tokens, size) each. Beams stand side by side and come from one text: what is there
    before they are first reordered, their prompt, is the same for all of them.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.room = tokens
        self.buffers: list[Tensor] = []
        self.prompt: int | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: object,
        **__: object,
    ) -> tuple[Tensor, Tensor]:
        """Add (rows, heads, new tokens, size) each; all that is there then."""
        before = self.get_seq_length()
        end = before + key_states.shape[2]
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
        if not self.buffers or end > self.buffers[0].shape[2]:
            rows, heads = key_states.shape[:2]
            self.room = max(end, self.room)
            self.buffers = [
                states.new_empty(rows, heads, self.room, states.shape[3]) for states in new
            ]
            for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
                if before:
                    buffer[:, :, :before] = old
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, before:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every beam go on from another one of its text."""
        if self.prompt is None:
            self.prompt = self.get_seq_length()
        for states in (self.keys, self.values):
            written = states[:, :, self.prompt :]
            written.copy_(written.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let every row stand so many times, one below the other."""
        super().batch_repeat_interleave(repeats)
        self.buffers = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self.buffers = []


def can_select(cache: object) -> bool:
    """Whether rows of what a model has read can be kept and others dropped."""
    layers = getattr(cache, "layers", ())
    return all(hasattr(part, "batch_select_indices") for part in (cache, *layers))


def cache_for(model: PreTrainedModel, tokens: int) -> Cache | None:
    """A cache with room for so many tokens; None for a model that needs one of its own kind."""
    if "past_key_values" not in signature(model.forward).parameters:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [_Layer(tokens) for _ in cache.layers]
    return cache
