"""A classifier's head: the checkpoint's own where it is for the same labels, or a new one."""

from collections.abc import Collection, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from fedalt.adapters.plan import HEAD
from fedalt.adapters.sites import head_layers
from fedalt.core.tree import Name


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


def _list(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 6} more" if len(labels) > 6 else ""
    return ", ".join(labels[:6]) + more
