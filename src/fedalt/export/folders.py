"""Writing a serving as a folder: one slot as a plain LoRA, or all of it."""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedalt.adapters.plan import HEAD, Mixer, Plan, Router, Slot, Sum
from fedalt.core.files import make_private_folder, open_private, write_private
from fedalt.core.tree import check_tree, select
from fedalt.export.peft_type import SLOTS, FedALTConfig, key_of
from fedalt.export.targets import (
    as_peft_reads,
    names_of_sites,
    saved_whole,
    targets_of,
    tensors_of_head,
)
from fedalt.methods.contract import Serving
from fedalt.models.base import BUILT_IN, PACKAGED, Base, gguf_file, location

IDENTITY = "base_model.json"
BUILT_IN_REFERENCE = f"fedalt:{BUILT_IN}"
_INDIVIDUAL = "individual"  # what methods call the adapter that is the client's own


def export_individual(
    serving: Serving, base: Base, folder: Path, *, slot: str | None = None, readme: str = ""
) -> Path:
    """Write one slot as a LoRA that PEFT loads without fedalt.

    By default that is the client's own, see `own_slot`. It computes what the serving does with a
    mixer or router fixed to that slot, or with a weight of 1 for it. A classifier's head is
    included. Raises ValueError, also where the folder holds something.
    """
    _require_fit(serving, base)
    chosen = own_slot(serving.plan) if slot is None else _slot(serving, slot)
    model = base.adapted.model
    whole = chosen.alpha == int(chosen.alpha)
    modules, parameters = targets_of(base.adapted)
    config = LoraConfig(
        **_for_any_type(base),
        target_modules=modules,
        target_parameters=parameters or None,
        base_model_name_or_path=_place(base.name),
        r=chosen.rank,
        lora_alpha=int(chosen.alpha) if whole else chosen.alpha,  # other tools may want an int
        # PEFT has no dropout for what is named by its parameter.
        lora_dropout=0.0 if parameters else serving.plan.dropout,
        fan_in_fan_out=any(
            isinstance(model.get_submodule(site).base_layer, Conv1D) for site in base.adapted.sites
        ),
    )
    tensors = {
        f"{name.site}.lora_{name.factor}.weight": tensor
        for name, tensor in select(serving.tree, chosen.name).items()
    }
    tensors = as_peft_reads(model, config, tensors)
    with new_folder(folder, readme) as unfinished:
        _write(unfinished, config, {**tensors, **_head(serving, base)})
        _write_identity(unfinished, base)
    return folder


def export_personal(
    serving: Serving,
    base: Base,
    folder: Path,
    *,
    readme: str = "",
    asked: Mapping[str, object] | None = None,
) -> Path:
    """Write all slots, mixer or router, head and tokenizer: `fedalt.load` and PEFT load the folder.

    The base model is not copied; it is named by hub id, absolute path or the name of its package,
    and the built-in one by "fedalt:tiny". `asked` tells a server how the model wants to be asked.
    Raises ValueError, also where the folder holds something.
    """
    _require_fit(serving, base)
    plan = serving.plan
    if not isinstance(plan.combine, Sum | Mixer | Router):
        raise ValueError(
            "this client weighs its adapters anew for every prompt, which no folder can hold; "
            "--format individual writes its own adapter, --column shared the shared part"
        )
    config = FedALTConfig(
        **_for_any_type(base),
        **_for_network(base),
        target_modules=names_of_sites(base.adapted),
        base_model_name_or_path=_reference(base.name),
        slots=[asdict(slot) for slot in plan.slots],
        weights=list(plan.combine.weights) if isinstance(plan.combine, Sum) else None,
        router=asdict(plan.combine) if isinstance(plan.combine, Router) else None,
        dropout=plan.dropout,
        asked=None if asked is None else dict(asked),
    )
    tensors = {
        f"{name.site}.{SLOTS}.{key_of(name)}": tensor
        for name, tensor in serving.tree.items()
        if name.slot != HEAD
    }
    with new_folder(folder, readme) as unfinished:
        _write(unfinished, config, {**tensors, **_head(serving, base)})
        base.tokenizer.save_pretrained(unfinished)
    return folder


def _require_fit(serving: Serving, base: Base) -> None:
    needed = {**serving.plan.shapes(base.adapted.sites), **base.adapted.heads}
    check_tree(serving.tree, needed, what="the serving to export")


def own_slot(plan: Plan) -> Slot:
    """The client's own adapter: a router's own, the individual one, or the only one.

    Raises ValueError where several others are one model together.
    """
    if isinstance(plan.combine, Router):
        return plan.slots[plan.combine.own]
    slots = {slot.name: slot for slot in plan.slots}
    own = slots.get(_INDIVIDUAL, plan.slots[0] if len(slots) == 1 else None)
    if own is None:
        raise ValueError(
            f"this client has no individual adapter: its adapters are {', '.join(slots)}; "
            "--format peft writes them as one"
        )
    return own


def _slot(serving: Serving, wanted: str) -> Slot:
    slots = {slot.name: slot for slot in serving.plan.slots}
    if wanted not in slots:
        raise ValueError(f"there is no slot {wanted!r} to export, only {', '.join(slots)}")
    return slots[wanted]


def _head(serving: Serving, base: Base) -> dict[str, Tensor]:
    return tensors_of_head(base.adapted, serving.tree, saved_whole(base.adapted))


def _for_any_type(base: Base) -> dict[str, Any]:
    """The fields of a PEFT configuration that do not depend on its type."""
    heads = saved_whole(base.adapted)
    return {
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "modules_to_save": heads or None,
        "inference_mode": True,
    }


def _for_network(base: Base) -> dict[str, Any]:
    """What the base model is loaded with."""
    config = base.adapted.model.config
    about: dict[str, Any] = {
        "pad_token_id": config.get_text_config().pad_token_id,
        "quantise": base.quantise,
        "base_identity": None if base.identity is None else base.identity.table(),
    }
    if base.adapted.heads:
        about["labels"] = [config.id2label[index] for index in range(config.num_labels)]
    return about


def _write_identity(folder: Path, base: Base) -> None:
    """What the base model is known by, beside a configuration that has no place for it."""
    if base.identity is not None:
        about = {"fingerprint": base.fingerprint, "identity": base.identity.table()}
        (folder / IDENTITY).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _reference(name: str) -> str:
    """What fedalt calls a base model in another working directory, and once its cache is empty."""
    if name == BUILT_IN:
        return BUILT_IN_REFERENCE
    if name in PACKAGED:
        return name
    file = gguf_file(name)
    # Not resolved: what a link leads to may have another ending.
    return _place(name) if file is None else str(file.absolute())


def _place(name: str) -> str:
    """Where a base model lies that transformers reads, for a reader in another directory."""
    place = location(name)
    return str(Path(place).resolve()) if Path(place).is_dir() else place


def _write(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Configuration and tensors; what PEFT wraps into its own model has longer keys."""
    plain = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    write_private(folder / CONFIG_NAME, json.dumps(plain, indent=2, sort_keys=True) + "\n")
    data = safetensors.torch.save(
        {
            # a copy: two names may share a tensor, which the format refuses
            f"base_model.model.{key}": tensor.detach().cpu().contiguous().clone()
            for key, tensor in tensors.items()
        },
        metadata={"format": "pt"},
    )
    with open_private(folder / SAFETENSORS_WEIGHTS_NAME, "wb") as file:
        file.write(data)


def require_free(folder: Path) -> None:
    """Raise ValueError where a folder holds something, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder.resolve()} exists already and is not empty")


@contextmanager
def new_folder(folder: Path, readme: str = "") -> Iterator[Path]:
    """A folder to fill, which gets its name once it is complete and is removed if it never is.

    All that others have written into it, such as a tokenizer, is then for its owner alone too.
    """
    folder = folder.resolve()
    require_free(folder)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    make_private_folder(unfinished)
    try:
        yield unfinished
        if readme:
            write_private(unfinished / "README.md", readme)
        for path in unfinished.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
