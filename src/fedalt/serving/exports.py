"""Exported folders as what a server has: their adapters on one base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedalt.core.tree import Name, Tree, check_tree
from fedalt.data.prompts import Template
from fedalt.export.folders import BUILT_IN_REFERENCE
from fedalt.export.loading import read_config
from fedalt.export.peft_type import SLOTS, FedALTConfig, register
from fedalt.methods.contract import Serving
from fedalt.models.base import BUILT_IN, Base, load_base
from fedalt.models.identity import differences, identity_in


@dataclass(frozen=True)
class Exported:
    """A folder's model, and the form and template of its prompts."""

    serving: Serving
    form: str
    template: Template


def exported(path: Path) -> dict[str, Path]:
    """The exported folders that a path stands for, by name: itself, or those right in it."""
    if (path / CONFIG_NAME).is_file():
        return {path.resolve().name: path}
    folders = (file.parent for file in sorted(path.glob(f"*/{CONFIG_NAME}")))
    # A hidden one is what an export that was killed has left.
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}


def open_exports(folders: Mapping[str, Path]) -> tuple[Base, int, dict[str, Exported]]:
    """Their base model, the longest answer of the first, in tokens, and all of them.

    Raises ValueError where they are not of one base model, or were exported before servers were
    there.
    """
    register()
    configs = {name: read_config(folder) for name, folder in folders.items()}
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        if config.asked is None:
            raise ValueError(
                f"{folders[name]} does not tell how it wants to be asked: it is a classifier's, or "
                "was exported by an older version; `fedalt export` writes it anew"
            )
        if config.base_identity != first.base_identity:
            raise ValueError(
                f"{folders[name]} and {folders[first_name]} have different base models; a server "
                "has one"
            )
    reference = str(first.base_model_name_or_path)
    base = load_base(
        BUILT_IN if reference == BUILT_IN_REFERENCE else reference,
        targets=first.target_modules,
        quantise=first.quantise,  # type: ignore[arg-type]
    )
    assert base.identity is not None
    assert first.base_identity is not None
    if told := differences(identity_in(first.base_identity), base.identity):
        raise ValueError(
            f"{folders[first_name]} was trained on another base model than {reference!r} is now: "
            f"{told}"
        )
    found = {name: _exported(folders[name], config, base) for name, config in configs.items()}
    assert first.asked is not None
    return base, int(first.asked["max_new_tokens"]), found


def _exported(folder: Path, config: FedALTConfig, base: Base) -> Exported:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    tree: Tree = {}
    for key, tensor in tensors.items():
        site, _, last = key.removeprefix("base_model.model.").partition(f".{SLOTS}.")
        slot, _, factor = last.rpartition("_")
        tree[Name(site, slot, factor)] = tensor
    plan, asked = config.plan(), config.asked
    check_tree(tree, plan.shapes(base.adapted.sites), what=str(file))
    assert asked is not None
    return Exported(Serving(plan, tree), str(asked["form"]), Template(str(asked["template"])))
