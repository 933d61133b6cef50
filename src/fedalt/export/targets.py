"""Names of an exported adapter's layers and tensors that PEFT reads as exactly these.

For some architectures PEFT renames what it reads, as transformers does with checkpoints of an older
layout, and takes a name of today for one of those. So the names are read once before they count.
"""

from collections.abc import Iterator, Mapping, Sequence

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import HEAD
from fedalt.core.tree import Tree, select

PREFIX = "base_model.model."


def targets_of(adapted: AdaptedModel) -> tuple[list[str], list[str]]:
    """The sites of a model as a LoRA's modules, and as parameters those that only a weight tells.

    PEFT takes `gate_proj` and its like in a mixture of experts for the experts of an older layout
    of the same architecture, however they are named, and their weights for what they are.
    """
    moved = [site for site in adapted.sites if not _is_taken_as_it_is(adapted, site)]
    if not moved:
        return names_of_sites(adapted), []
    rest = [site for site in adapted.sites if site not in moved]
    return sorted(rest), sorted(f"{site}.weight" for site in moved)


def names_of_sites(adapted: AdaptedModel) -> list[str]:
    """The sites' last names, as people write them, or whole paths where those say too much."""
    endings = {site.rpartition(".")[2] for site in adapted.sites}
    modules = (path for path, _ in adapted.model.named_modules())
    meant = {path for path in modules if path.rpartition(".")[2] in endings}
    return sorted(endings if meant == adapted.sites.keys() else adapted.sites)


def _is_taken_as_it_is(adapted: AdaptedModel, site: str) -> bool:
    asked = LoraConfig(target_modules=[site])
    try:
        convert_peft_config_for_transformers(asked, adapted.model, None)
    except ValueError:
        return False
    return set(asked.target_modules or ()) == {site} and not asked.target_parameters


def saved_whole(adapted: AdaptedModel) -> list[str]:
    """The modules of a classifier's head, which PEFT saves whole."""
    network = set(adapted.model.base_model.modules())
    names = set()
    for name in adapted.heads:
        inside = adapted.model.get_submodule(name.site) in network
        names.add(name.site if inside else name.site.partition(".")[0])
    return sorted(names)


def tensors_of_head(adapted: AdaptedModel, tree: Tree, names: Sequence[str]) -> dict[str, Tensor]:
    """All tensors of the modules that are saved whole: the trained ones, and the base's beside.

    PEFT goes by the ends of names: `classifier` is `pre_classifier`, too.
    """
    trained = {f"{name.site}.{name.factor}": tensor for name, tensor in select(tree, HEAD).items()}
    whole: dict[str, Tensor] = {}
    for path, module in adapted.model.named_modules():
        if any(path.endswith(name) for name in names):
            whole |= {
                _plain(f"{path}.{key}"): tensor for key, tensor in module.state_dict().items()
            }
    return whole | trained


def _plain(key: str) -> str:
    """A tensor's name in the model before its layers were wrapped."""
    return ".".join(part for part in key.split(".") if part != "base_layer")


def as_peft_reads(
    model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors under names which PEFT reads as theirs; mostly these are the same.

    Raises ValueError where there are none.
    """
    named = {PREFIX + key: tensor for key, tensor in tensors.items()}
    read = _read(model, config, named)
    readable = {}
    for key, tensor in named.items():
        if _is(read.get(key), tensor):
            readable[key] = tensor
            continue
        other = next(
            (
                older
                for older in _older_names(model, key)
                if _is(_read(model, config, {older: tensor}).get(key), tensor)
            ),
            None,
        )
        if other is None:
            raise ValueError(
                f"PEFT reads {key.removeprefix(PREFIX)!r} of a {model.config.model_type} model by "
                "another name, so no plain LoRA can hold this adapter; --format fedalt writes all "
                "of the client's model, which fedalt.load reads"
            )
        readable[other] = tensor
    return {key.removeprefix(PREFIX): tensor for key, tensor in readable.items()}


def _read(
    model: PreTrainedModel, config: LoraConfig, named: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    try:
        read: Mapping[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(
            model, config, dict(named)
        )
    except (ValueError, RuntimeError, KeyError, IndexError):  # it wants parts that are not there
        return {}
    return read


def _older_names(model: PreTrainedModel, key: str) -> Iterator[str]:
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightRenaming):
            older, matched = conversion.reverse_transform().rename_source_key(key)
            if matched is not None and older != key:
                yield older


def _is(read: Tensor | None, tensor: Tensor) -> bool:
    return read is not None and read.shape == tensor.shape and bool((read == tensor).all())
