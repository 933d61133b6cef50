"""Norms, gates and rotary embeddings of a model compiled by torch: fewer passes over memory.

Nothing outside the one model changes: its modules get a `forward` of their own, their classes and
weights stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalt.adapters.packing import agree

# What transformers' attentions of this kind call, by the name that they know it by.
_ROTARY: Final = "apply_rotary_pos_emb"
_GATED: Final = {"gate_proj", "up_proj", "down_proj", "act_fn"}

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Compiled:
    """The kinds of parts that are compiled; if there are none, why not."""

    parts: tuple[str, ...]
    why_not: str = ""


def try_compiling(model: PreTrainedModel) -> Compiled:
    """Compile what is known to consist of small operations, if that can be done, which is tried.

    Forward and backward pass are compared with those before. Where the compiler fails, or computes
    something else, the model is left as it was.
    """
    parts = list(_parts(model))
    if not parts:
        return Compiled((), "no part of this architecture is known to gain from it")
    wanted = _play(model)
    for _, module, forward in parts:
        module.forward = forward
    try:
        if all(agree(*pair) for pair in zip(_play(model), wanted, strict=True)):
            # What fails later, for a kind of batch that was not tried, is computed as without it.
            torch._dynamo.config.suppress_errors = True
            return Compiled(tuple(dict.fromkeys(kind for kind, *_ in parts)))
        why_not = "it computes something else when compiled"
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        # A line with a colon at its end only says that the next one says what was wrong.
        why_not = next((each for each in lines if each and not each.endswith(":")), repr(error))
    for _, module, _ in parts:
        del module.forward
    return Compiled((), why_not)


def _play(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of some tokens, and the gradient of their inputs."""
    ids = torch.arange(1, 8, device=model.device)[None] % model.config.get_text_config().vocab_size
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    (grad,) = torch.autograd.grad(logits.float().square().sum(), inputs)
    return logits.detach(), grad


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Forward]]:
    """What kind of part it is, the module, and what it shall compute with."""
    compiled = cache(partial(torch.compile, dynamic=True))  # one for all modules of a class
    for module in model.modules():
        own: Any = type(module).forward
        if "forward" in vars(module):  # somebody else's, such as accelerate's
            continue
        if type(module).__name__.endswith("RMSNorm"):
            yield "norms", module, partial(_by_rows, partial(compiled(own), module))
        elif dict(module.named_children()).keys() >= _GATED:
            yield "gates", module, partial(_gated, module, compiled(_gate))
        elif isinstance(own, FunctionType) and _ROTARY in own.__code__.co_names:
            names = {**own.__globals__, _ROTARY: compiled(own.__globals__[_ROTARY])}
            yield "rotary embeddings", module, partial(_renamed(own, names), module)


def _by_rows(compute: Forward, *each: Tensor) -> Tensor:
    """A function of rows on tensors of any batch: else every kind of batch would be compiled."""
    rows: Tensor = compute(*(one.reshape(-1, one.shape[-1]) for one in each))
    return rows.view(each[0].shape)


def _gate(act: Forward, gate: Tensor, up: Tensor) -> Tensor:
    activated: Tensor = act(gate)
    return activated * up


def _gated(mlp: Any, gate: Forward, x: Tensor) -> Tensor:
    """What Llama's MLP computes."""
    inner = _by_rows(partial(gate, mlp.act_fn), mlp.gate_proj(x), mlp.up_proj(x))
    out: Tensor = mlp.down_proj(inner)
    return out


def _renamed(function: FunctionType, names: Mapping[str, Any]) -> FunctionType:
    """The same function, in which names of its module mean something else."""
    copy = FunctionType(
        function.__code__,
        dict(names),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
