"""A model from its checkpoint: every tensor comes from it, or is told.

Transformers fills what a checkpoint lacks with random numbers and leaves out what has no place. It
says so in a report, which is read here. A classifier's head alone may be new: it is the
checkpoint's own where that is for the same labels.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedalt.adapters.plan import HEAD
from fedalt.adapters.sites import head_layers
from fedalt.core.tree import Name
from fedalt.models.errors import ModelError, in_short


@dataclass(frozen=True)
class Loaded:
    """A model, and the names of its tensors that the checkpoint did not give (a head's alone)."""

    model: PreTrainedModel
    fresh: frozenset[str]


def load_weights(kind: Any, place: str, name: str, options: Mapping[str, Any]) -> Loaded:
    """A model of an auto class, with all its weights from the checkpoint but for a head's.

    Fresh tensors are the same in every process. Raises ModelError.
    """
    try:
        # Seeded, and the global generator stays as it was.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, report = kind.from_pretrained(
                place,
                **options,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
    except Exception as error:  # a checkpoint is foreign data: reading it may raise anything
        raise ModelError(f"cannot load the model {name!r}: {_why(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{name!r} holds an adapter, not a whole model; give its base model")
    shapes = {key: (list(its), list(own)) for key, its, own in report["mismatched_keys"]}
    fresh = {*report["missing_keys"], *shapes}
    allowed = _of_head(model, report["missing_keys"])
    left_over = _left_over(model, report["unexpected_keys"])
    if lacking := fresh - allowed - shapes.keys():
        several, others = _count(lacking, "tensor"), report["unexpected_keys"]
        beside = f", and has {_count(others, 'other')}, first {min(others)}" if others else ""
        raise ModelError(_not_of(model, name, f"lacks {several}, first {min(lacking)}{beside}"))
    if wrong := sorted(shapes.keys() - allowed):
        its, expected = shapes[wrong[0]]
        raise ModelError(
            f"the checkpoint of {name!r} does not fit its config.json: {_count(wrong, 'tensor')} "
            f"of another shape, first {wrong[0]} with {its}, expected {expected}"
        )
    if left_over:
        count = _count(left_over, "tensor")
        told = f"has {count} without a place in the model, first {min(left_over)}"
        raise ModelError(_not_of(model, name, told))
    return Loaded(model, frozenset(fresh & allowed))


def tensors_of_head(model: PreTrainedModel, fresh: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a classifier's head by their names in the model."""
    return {
        f"{path}.{factor}": tensor
        for path, layer in head_layers(model, fresh).items()
        for factor, tensor in layer.named_parameters()
    }


def own_head(
    model: PreTrainedModel, fresh: Collection[str], own: Sequence[str], labels: Sequence[str]
) -> dict[Name, Tensor]:
    """What a head begins with if its checkpoint was trained for the same labels, else nothing.

    In float32, with the rows of the last layer in the order of `labels`; `own` is that of the
    checkpoint.
    """
    tensors = tensors_of_head(model, fresh)
    if sorted(own) != sorted(labels) or not tensors or any(name in fresh for name in tensors):
        return {}
    order = [own.index(label) for label in labels]
    last = list(head_layers(model, fresh))[-1]
    begins = {}
    for name, tensor in tensors.items():
        site, _, factor = name.rpartition(".")
        begun = tensor.detach().float().cpu()
        begins[Name(site, HEAD, factor)] = begun[order] if site == last else begun.clone()
    return begins


def notes_on_head(
    model: PreTrainedModel,
    fresh: Collection[str],
    labels: tuple[Sequence[str], Sequence[str]],
    *,
    kept: bool,
) -> tuple[str, ...]:
    """What a user should know of where a head begins; `labels`: the checkpoint's, the data's."""
    own, wanted = labels
    notes = []
    if kept:
        notes.append(f"the head begins as the checkpoint's own, for the labels {_list(wanted)}")
    elif own:
        notes.append(
            f"the checkpoint's own head, for the labels {_list(own)}, is not used: a new one for "
            f"{_list(wanted)} is trained"
        )
    inside = [
        path
        for path in head_layers(model, fresh)
        if f"{path}.weight" in fresh and path.partition(".")[0] not in ("classifier", "score")
    ]
    if inside:
        notes.append(
            f"trained with the head, because the checkpoint lacks them: {', '.join(inside)}"
        )
    return tuple(notes)


def _why(error: Exception) -> str:
    if "Unrecognized configuration class" in str(error):
        return in_short(ValueError(str(error).split(" for this kind of AutoModel")[0]))
    return in_short(error)


def _of_head(model: PreTrainedModel, missing: Collection[str]) -> set[str]:
    """The names of a classifier's tensors that training begins anew: those of its head.

    The same layers as `head_layers` finds, and such constants beside them as a fresh norm's.
    """
    layers = head_layers(model, missing)
    if not layers:
        return set()
    names = {f"{path}.{factor}" for path in layers for factor in ("weight", "bias")}
    network = set(model.base_model.modules())
    return names | {
        key
        for key in missing
        if model.get_submodule(key.rpartition(".")[0]) not in network
        and _constant(model.get_parameter_or_buffer(key))
    }


def _constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _left_over(model: PreTrainedModel, unexpected: Iterable[str]) -> set[str]:
    """Tensors that belong to the network itself and not to some other head beside it."""
    buffers = {name for name, _ in model.named_buffers()}
    network = model.base_model_prefix
    own = {name.partition(".")[0] for name in model.state_dict()}
    heads = {path.partition(".")[0] for path in head_layers(model)}
    inside = {name for name, _ in model.base_model.named_children()}
    return {
        key
        for key in unexpected
        if key not in buffers
        and key.partition(".")[0] not in heads
        and (key.partition(".")[0] in {network, *inside} or key.partition(".")[0] in own)
    }


def _not_of(model: PreTrainedModel, name: str, told: str) -> str:
    return (
        f"the checkpoint of {name!r} {told}: expected the weights of a {type(model).__name__} as "
        "its config.json describes it; what is missing would be drawn at random"
    )


def _count(keys: Collection[str], word: str) -> str:
    return f"{len(keys)} {word}" + ("" if len(keys) == 1 else "s")


def _list(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 6} more" if len(labels) > 6 else ""
    return ", ".join(labels[:6]) + more
