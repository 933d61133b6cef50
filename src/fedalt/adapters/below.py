"""The blocks below the lowest adapted layer: what they make of a text stays the same all along.

Adapters that sit in upper blocks only leave those below frozen and alike for every client, so that
their output for a text is kept, within a budget of memory, and not computed again.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalt.adapters.packing import agree, packed, packing_of

_BUDGET: Final = 2**30  # bytes of hidden states that are kept


class _ReachedError(Exception):
    """What goes into the lowest adapted block, on its way out of the model."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Below:
    """The blocks of a model before the one at `lowest`, which can be left out."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], lowest: int) -> None:
        self._model = model.base_model
        self._left_out = blocks[:lowest]
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._room, self._token_bytes = _BUDGET, 0
        self._given: Tensor | None = None
        self._reading = False
        for block in self._left_out:
            block.forward = partial(self._pass, block.forward)
        self._hook = blocks[lowest].register_forward_pre_hook(self._enter)

    def undo(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        for block in self._left_out:
            del block.forward

    def hidden(self, texts: Sequence[tuple[int, ...]]) -> Tensor | None:
        """What goes into the lowest adapted block for packed texts, (1, tokens, hidden).

        Each is computed by itself, so that it does not depend on who shares its first pass. None if
        not all of them can be kept.
        """
        missing = set(texts) - self._kept.keys()
        room = self._room - self._token_bytes * sum(map(len, missing))
        if room < 0:
            return None
        self._room = room
        self._kept |= {text: self.read(text) for text in missing}
        return torch.cat([self._kept[text] for text in texts], 1)

    @contextmanager
    def left_out(self, hidden: Tensor) -> Iterator[None]:
        """Within this context a forward pass begins with `hidden` at the lowest adapted block."""
        before, self._given = self._given, hidden
        try:
            yield
        finally:
            self._given = before

    @torch.no_grad()
    def read(self, text: tuple[int, ...]) -> Tensor:
        """What goes into the lowest adapted block for one text, (1, tokens, hidden)."""
        device = self._model.device
        packing = packing_of([[len(text)]], device)
        ids = torch.tensor([text], device=device)
        self._reading = True
        try:
            with packed(packing):
                self._model(input_ids=ids, position_ids=packing.positions, use_cache=False)
        except _ReachedError as reached:
            self._token_bytes = reached.hidden.nbytes // len(text)
            return reached.hidden
        finally:
            self._reading = False
        raise TypeError("the lowest adapted block was not reached")

    def _pass(self, forward: Any, hidden: Tensor, *args: Any, **named: Any) -> Any:
        return forward(hidden, *args, **named) if self._given is None else hidden

    def _enter(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        if self._reading:
            raise _ReachedError(hidden)
        return inputs if self._given is None else (self._given, *rest)


def try_leaving_out(model: PreTrainedModel, sites: Iterable[str]) -> Below | None:
    """The blocks below the lowest adapted one, if there are any and it works, which is tried."""
    found = _blocks(model)
    if found is None:
        return None
    name, blocks = found
    numbers = [site.removeprefix(f"{name}.").partition(".")[0] for site in sites]
    if not numbers or "0" in numbers or not all(each.isdecimal() for each in numbers):
        return None
    text = tuple(each % model.config.get_text_config().vocab_size for each in range(1, 8))
    packing = packing_of([[len(text)]], model.device)

    @torch.no_grad()
    def logits() -> Tensor:
        ids = torch.tensor([text], device=model.device)
        with packed(packing):
            out = model(input_ids=ids, position_ids=packing.positions, use_cache=False)
        return cast(Tensor, out.logits)

    whole = logits()
    below = Below(model, blocks, min(map(int, numbers)))
    try:
        with below.left_out(below.read(text)):
            if agree(logits(), whole):
                return below
    except (AttributeError, TypeError, ValueError):
        pass
    below.undo()
    return None


def _blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]] | None:
    """The model's list of blocks and its path: the first list, others lie within blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            return name, list(module)
    return None
