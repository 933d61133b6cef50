"""Which layers of a model are adapted, and which are a classifier's head."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedalt.adapters.plan import Shape
from fedalt.adapters.reach import is_in_a_block, plain_layers

ALL_LINEAR = "all-linear"
# Of these architectures PEFT adapts no layer of this name: fast kernels read its weight and leave
# the layer itself, and what is beside it, out.
_STATE_SPACE: Final = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
_FUSED_INTO_THE_SCAN: Final = "out_proj"


def linear_layers(
    model: PreTrainedModel, fresh: Collection[str] = ()
) -> dict[str, tuple[nn.Module, bool]]:
    """Linear layers by path, without the output embedding and a classification head.

    With each, whether it always sees all texts; else clients cannot share a pass. Only those that a
    text goes through as through a plain linear layer, which is tried: a router that is built on one
    returns more than a product, and images have a tower of their own. `fresh`: as for
    `head_layers`.
    """
    excluded = {id(model.get_output_embeddings())} | {
        id(layer) for layer in head_layers(model, fresh).values()
    }
    candidates = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and id(layer) not in excluded
    }
    if model.config.model_type in _STATE_SPACE:
        candidates = {
            path: layer
            for path, layer in candidates.items()
            if path.rpartition(".")[2] != _FUSED_INTO_THE_SCAN
        }
    plain = plain_layers(model, candidates)
    return {path: (layer, plain[path]) for path, layer in candidates.items() if path in plain}


def head_layers(model: PreTrainedModel, fresh: Collection[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers of a sequence classifier's head, by path; none for other models.

    As in PEFT, the head is what the model calls `classifier` or `score`, and where it calls nothing
    so, all that stands beside its network. `fresh` names tensors that the checkpoint lacks: a layer
    of random numbers, such as a pooler that was never trained, belongs to the head as well.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return {}
    linear = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    # PEFT goes by the ends of names: DistilBERT's pre_classifier is meant, too.
    named = {path for path in linear if path.split(".")[0].endswith(("classifier", "score"))}
    if not named:
        network = set(model.base_model.modules())
        named = {path for path, layer in linear.items() if layer not in network}
    return {
        path: layer
        for path, layer in linear.items()
        if path in named or (f"{path}.weight" in fresh and not is_in_a_block(path))
    }


def chosen(
    model: PreTrainedModel, linear: Mapping[str, nn.Module], targets: str | Sequence[str] | None
) -> list[str]:
    """Paths of the layers to adapt, in the model's order."""
    kind = model.config.model_type
    if not linear:
        raise ValueError(f"no layer of this {kind} model can be adapted: none is linear")
    if targets == ALL_LINEAR:
        return list(linear)
    if targets is None:
        # Two seconds of imports that every command would wait for.
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        # A model that reads images as well has a language model of a type of its own.
        targets = known.get(kind) or known.get(model.config.get_text_config().model_type)
        if targets is None:
            raise ValueError(
                f"no default sites are known for the architecture {kind!r}; name them, or use "
                f"{ALL_LINEAR!r}; its linear layers end in {_endings(linear)}"
            )
        if isinstance(targets, str):  # PEFT's pattern for whole paths, of multimodal models
            return [path for path in linear if re.fullmatch(targets, path)]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ValueError(f"an empty list of sites; the linear layers end in {_endings(linear)}")
    for target in wanted:
        if not any(_ends(path, target) for path in linear):
            close = difflib.get_close_matches(target, _endings(linear), n=3, cutoff=0.3)
            raise ValueError(
                f"no layer of this {kind} model that can be adapted is called {target!r}; "
                f"close names: {', '.join(close or _endings(linear))}"
            )
    return [path for path in linear if any(_ends(path, target) for target in wanted)]


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def _endings(linear: Mapping[str, nn.Module]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in linear})


def shape_of(layer: nn.Module) -> Shape:
    """Inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):  # GPT-2 stores (d_in, d_out)
        return Shape(*layer.weight.shape)
    assert isinstance(layer, nn.Linear)
    return Shape(layer.in_features, layer.out_features)
