"""Several texts in one row without padding, and attention that stays inside each of them.

A transformers model computes everything but attention token by token, so texts can stand in one
row of (1, tokens) if positions start anew with each. Attention alone is laid out in blocks of texts
of similar length for the moment of its kernel, padded on the right, where a causal mask hides the
padding by itself.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED: Final = "fedalt_packed"


# What configurations call a window or chunk beyond which a token attends to nothing.
_WINDOWS: Final = (
    "sliding_window",
    "sliding_window_size",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "window_size",
)
# A block ends where texts become shorter than this share of its longest, unless it is small.
_SIMILAR, _SMALL = 0.75, 256


@dataclass(frozen=True)
class Packing:
    """Where texts of one row begin and end.

    `blocks` (texts, longest) hold texts of similar length: which token of the row stands there;
    the first one where none does. `places` (tokens,): where in the flattened blocks, one after the
    other, a token stands. `missing` are, for each block, the places (texts, longest) without a
    token, None where it has none. `positions` (1, tokens) start at 0 with each text. `spans` are
    the numbers of tokens of each client, None where they are equal. `seen` says for each block
    which tokens see which, (texts, 1, longest, longest); None: all that come before.
    """

    blocks: tuple[Tensor, ...]
    places: Tensor
    missing: tuple[Tensor | None, ...]
    positions: Tensor
    spans: tuple[int, ...] | None
    seen: tuple[Tensor, ...] | None = None


def packing_of(groups: Sequence[Sequence[int]], device: torch.device | str) -> Packing:
    """The packing of texts of these lengths, in this order, client by client."""
    lengths = [length for group in groups for length in group]
    tokens = tuple(sum(group) for group in groups)
    spans = None if len(set(tokens)) == 1 else tokens
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    blocks, missing = [], []
    places = torch.empty(sum(lengths), dtype=torch.long)
    before = 0
    for texts in _of_similar_length(lengths):
        steps = torch.arange(lengths[texts[0]])
        is_token = steps < sizes[texts, None]
        rows = starts[texts, None] + steps
        numbers = torch.arange(is_token.numel()).reshape(is_token.shape) + before
        places[rows[is_token]] = numbers[is_token]
        before += is_token.numel()
        blocks.append(torch.where(is_token, rows, 0).to(device))
        missing.append(None if bool(is_token.all()) else (~is_token).to(device))
    return Packing(tuple(blocks), places.to(device), tuple(missing), positions.to(device), spans)


def branching(
    groups: Sequence[Sequence[tuple[int, Sequence[int]]]], device: torch.device | str
) -> Packing:
    """The packing of each client's texts that branch: (tokens of the trunk, of each branch).

    The branches stand behind the trunk, one after the other. Each continues it as if it were alone.
    """
    lengths = [[trunk + sum(branches) for trunk, branches in texts] for texts in groups]
    plain = packing_of(lengths, device)
    positions, branch_of = [], []
    for trunk, branches in (text for texts in groups for text in texts):
        positions += [torch.arange(trunk), *(trunk + torch.arange(length) for length in branches)]
        numbers = torch.arange(len(branches) + 1)
        branch_of.append(numbers.repeat_interleave(torch.tensor([trunk, *branches])))
    whose = torch.cat(branch_of).to(device)
    seen = []
    for rows in plain.blocks:
        own = whose[rows]
        before = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=device).tril()
        same = (own[:, None, :] == 0) | (own[:, None, :] == own[:, :, None])
        seen.append((before & same)[:, None])
    return replace(plain, positions=torch.cat(positions)[None].to(device), seen=tuple(seen))


def _of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Which texts stand in a block, longest first."""
    blocks: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        longest = lengths[blocks[-1][0]] if blocks else 0
        small = blocks and longest * len(blocks[-1]) < _SMALL
        if small or (blocks and lengths[text] >= _SIMILAR * longest):
            blocks[-1].append(text)
        else:
            blocks.append([text])
    return blocks


class _Cell:
    """What the attention of every model looks at; backward passes on a GPU run in other threads."""

    packing: Packing | None = None


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """Within this context a model's row consists of these texts; None: its rows are texts."""
    before, _Cell.packing = _Cell.packing, packing
    try:
        yield
    finally:
        _Cell.packing = before


def agree(logits: Tensor, wanted: Tensor) -> bool:
    """Whether logits are equal but for the rounding of their dtype."""
    share = 1e-3 if torch.finfo(wanted.dtype).bits > 16 else 5e-2
    logits, wanted = logits.double(), wanted.double()
    return float((logits - wanted).norm()) <= share * max(float(wanted.norm()), 1e-3)


def _same(logits: Tensor, wanted: Tensor) -> bool:
    """Whether nothing of another text gets into logits, such as the state of a recurrence."""
    most, size = float((logits - wanted).abs().max()), float(wanted.abs().max())
    rounding: float = torch.finfo(wanted.dtype).eps
    return most <= 50 * rounding * max(size, 1e-3)


@dataclass(frozen=True)
class Packs:
    """How long packed texts may be; 0: they are not packed, and why not."""

    longest: int
    why_not: str = ""


def _window(config: Any) -> int:
    """The smallest window or chunk of tokens that any layer's attention is kept to."""
    values = (
        getattr(part, key, None) for part in (config, config.get_text_config()) for key in _WINDOWS
    )
    return min(
        (value for value in values if isinstance(value, int) and value > 0), default=sys.maxsize
    )


def try_packing(model: PreTrainedModel) -> Packs:
    """Whether a model computes the same for packed texts, which is tried.

    Leaves the model's attention as it was if it does not, and ready for `packed` if it does.
    """
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    if attention != "sdpa":
        return Packs(0, f"its attention is {attention!r} and not 'sdpa'")
    # Within its window a model attends to everything before.
    longest = _window(config)
    lengths = [min(longest, 4), min(longest, 3)]
    size = config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + sum(lengths), device=model.device) % size
    texts = [part[None] for part in ids.split(lengths)]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=text).logits for text in texts], 1)
        try:
            model.set_attn_implementation(PACKED)
            packing = packing_of([lengths], model.device)
            with packed(packing):
                together, beside = (
                    model(
                        input_ids=torch.cat([first, texts[1]], 1),
                        position_ids=packing.positions,
                        use_cache=False,
                    ).logits
                    for first in (texts[0], (texts[0] + lengths[0]) % size)
                )
            second = slice(lengths[0], None)
            if agree(together, alone) and _same(beside[:, second], together[:, second]):
                return Packs(longest)
        except Exception:  # noqa: S110 - a network that packing does not suit may fail anyhow
            pass
    model.set_attn_implementation("sdpa")
    return Packs(0, "it computes something else for packed texts")


class _Spread(torch.autograd.Function):
    """(tokens, ...) to blocks (texts, longest, ...); its gradient is a gather, not an addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing = packing
        return tuple(x[rows] for rows in packing.blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        joined: Tensor = _Join.apply(ctx.packing, *grads)  # type: ignore[no-untyped-call]
        return joined, None


class _Join(torch.autograd.Function):
    """Blocks (texts, longest, ...) to (tokens, ...)."""

    @staticmethod
    def forward(ctx: Any, packing: Packing, *blocks: Tensor) -> Tensor:
        ctx.packing = packing
        flat = [block.flatten(0, 1) for block in blocks]
        return (flat[0] if len(flat) == 1 else torch.cat(flat))[packing.places]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        spread: tuple[Tensor, ...] = _Spread.apply(grads[0], packing)  # type: ignore[no-untyped-call]
        return None, *(
            block if missing is None else block.masked_fill(missing[..., None, None], 0.0)
            for block, missing in zip(spread, packing.missing, strict=True)
        )


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of (1, heads, tokens, size), text by text; without a packing that of torch."""
    packing = _Cell.packing
    if packing is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return plain
    masks = packing.seen or [None] * len(packing.blocks)
    options["is_causal"] = packing.seen is None
    parts = (
        _Spread.apply(whole[0].transpose(0, 1), packing)  # type: ignore[no-untyped-call]
        for whole in (query, key, value)
    )
    outs = []
    for *block, mask in zip(*parts, masks, strict=True):
        q, k, v = (part.transpose(1, 2) for part in block)
        outs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    joined: Tensor = _Join.apply(packing, *outs)  # type: ignore[no-untyped-call]
    return joined[None], None


def _mask(*given: Any, **named: Any) -> Tensor | None:
    """No mask where texts are packed."""
    return None if _Cell.packing is not None else sdpa_mask(*given, **named)


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, _mask)
