"""Keys and values of texts that begin and end at any time, in place.

All texts end in the same column, so that one more token of each is one more column for all. A text
that comes is put to the left of it, and one that goes is replaced by the last row: nothing else is
copied, but for a new buffer once the columns are used up.
"""

from typing import Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_SPARE: Final = 64  # columns of a new buffer for tokens to come


def tokens_held(rows: int, longest: int) -> int:
    """The most tokens that buffers have room for while so many texts get as long as that."""
    return _rows_for(rows) * (longest + _SPARE)


def longest_in(room: int) -> int:
    """How long a text may get that has room for so many tokens to itself."""
    return max(0, room - _SPARE)


def _rows_for(rows: int) -> int:
    """Rows of a new buffer: a power of two, so that not every text that comes needs another."""
    return 1 << (rows - 1).bit_length() if rows else 0


class _Window(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer's `keys` and `values`: a part of two buffers (rows, heads, columns, size)."""

    keys: Tensor
    values: Tensor

    def __init__(self, buffers: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.lazy_initialization(*buffers)
        self.buffers = buffers
        self.rows, self.columns = 0, slice(0, 0)

    def show(self, rows: int, columns: slice) -> None:
        """Let the model see these; what it adds comes right behind."""
        self.rows, self.columns = rows, columns
        self.keys, self.values = (buffer[:rows, :, columns] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Add one token of each row; all that is there then."""
        end = self.columns.stop
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, end : end + 1] = states
        self.show(self.rows, slice(self.columns.start, end + 1))
        return self.keys, self.values


class Columns:
    """What a model has read of some texts, a row each, in the order of `lengths` (tokens)."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.cache = Cache(layers=[])
        self._end = 0  # the column behind the last token of every row

    def add(self, read: Cache) -> None:
        """Another row: what the model has read of a text alone."""
        length, row, room = read.get_seq_length(), len(self.lengths), self._room(0)
        if row == room or length > self._end:
            self._renew(read, length, _rows_for(row + 1))
        for window, alone in zip(self.cache.layers, read.layers, strict=True):
            for buffer, states in zip(window.buffers, (alone.keys, alone.values), strict=True):
                buffer[row, :, self._end - length : self._end] = states[0]
        self.lengths.append(length)

    def drop(self, row: int) -> None:
        """The row is gone, and the last one takes its place."""
        last = len(self.lengths) - 1
        length = self.lengths[row] = self.lengths[last]
        for window in self.cache.layers:
            for buffer in window.buffers:
                ours = slice(self._end - length, self._end)
                buffer[row, :, ours] = buffer[last, :, ours]
        self.lengths.pop()
        if not self.lengths:
            self.cache = Cache(layers=[])  # nobody holds memory for texts that are gone

    def grow(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Make room for a token of every row, which the model then reads.

        Its attention mask (rows, tokens), and positions (rows, 1).
        """
        width = max(self.lengths)
        if self._end == self._room(2):
            self._renew(self.cache, width, _rows_for(len(self.lengths)))
        for window in self.cache.layers:
            window.show(len(self.lengths), slice(self._end - width, self._end))
        self._end += 1
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        mask = torch.arange(width, -1, -1, device=device) <= lengths
        return mask.long(), lengths

    @property
    def held(self) -> int:
        """The tokens that the buffers have room for."""
        return self._room(0) * self._room(2)

    @property
    def bytes_per_token(self) -> int:
        """What one token of one row takes in all layers."""
        buffers = [buffer for layer in self.cache.layers for buffer in layer.buffers]
        return int(sum(buffer.nbytes for buffer in buffers)) // self.held

    def _room(self, axis: int) -> int:
        """Rows (axis 0) or columns (axis 2) of the buffers."""
        layers = self.cache.layers
        return int(layers[0].buffers[0].shape[axis]) if layers else 0

    def _renew(self, like: Cache, length: int, room: int) -> None:
        """New buffers for `room` rows and tokens to come, with what the old ones hold."""
        held = max(self.lengths, default=0)
        width, rows = max(held, length), len(self.lengths)
        windows = []
        for at, layer in enumerate(like.layers):
            buffers = []
            for which, states in enumerate((layer.keys, layer.values)):
                # Zeros: what a mask hides is multiplied by zero, which not all numbers bear.
                new = states.new_zeros(room, states.shape[1], width + _SPARE, states.shape[3])
                if rows:
                    old = self.cache.layers[at].buffers[which]
                    new[:rows, :, width - held : width] = old[
                        :rows, :, self._end - held : self._end
                    ]
                buffers.append(new)
            windows.append(_Window((buffers[0], buffers[1])))
        self.cache, self._end = Cache(layers=windows), width
