"""Which layers an exported adapter is for, in words that PEFT reads as exactly these layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor

from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import HEAD
from fedalt.core.tree import Tree, select


@dataclass(frozen=True)
class Targets:
    """A LoRA's layers: `modules` by name, `parameters` those that only their weight's name tells.

    PEFT takes `gate_proj` and its like in a mixture of experts for the experts of an older layout
    of the same architecture, however they are named, and their weights for what they are.
    """

    modules: list[str]
    parameters: list[str]


def targets_of(adapted: AdaptedModel) -> Targets:
    """The sites of a model as targets of a LoRA."""
    moved = [site for site in adapted.sites if not _is_taken_as_it_is(adapted, site)]
    if not moved:
        return Targets(names_of_sites(adapted), [])
    rest = [site for site in adapted.sites if site not in moved]
    return Targets(sorted(rest), sorted(f"{site}.weight" for site in moved))


def names_of_sites(adapted: AdaptedModel) -> list[str]:
    """The sites' last names, as people write them, or whole paths where those say too much."""
    endings = {site.rpartition(".")[2] for site in adapted.sites}
    meant = {path for path, _ in adapted.model.named_modules() if _ends_in(path, endings)}
    return sorted(endings if meant == adapted.sites.keys() else adapted.sites)


def _ends_in(path: str, endings: set[str]) -> bool:
    return path.rpartition(".")[2] in endings


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
