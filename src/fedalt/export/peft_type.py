"""FedALT as a PEFT type: once registered, PEFT loads, runs, trains and saves whole servings."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedalt.adapters.lowrank import Combination, add_low_rank
from fedalt.adapters.plan import Mixer, Plan, Router, Slot, Sum
from fedalt.adapters.sites import shape_of
from fedalt.core.tree import Name

PREFIX = "fedalt_"  # PEFT finds a type's tensors by it
SLOTS = "fedalt_slots"


class Kind(StrEnum):
    """The type's name.

    PEFT's own list of types is closed, but it looks types up in mappings by their text, and a
    member of any other text enum is as good there.
    """

    FEDALT = "FEDALT"


@dataclass
class FedALTConfig(PeftConfig):  # type: ignore[misc]  # PEFT's classes have no usable types
    """What adapter_config.json holds; PEFT itself changes fields of it, so it is not frozen.

    `slots` are mappings of name, rank and alpha. `weights` are those of a fixed sum, `router` maps
    the fields of a router to their values; without both a mixer decides. `labels` are a
    classifier's, in the order of its outputs, and `pad_token_id` what it skips to find a text's
    last token. `quantise` is how the base model is kept, "8bit" or "4bit", and
    `base_identity` the table of what it is known by. `asked` is how a text becomes a prompt and how
    long an answer is, for a server. The fields before all these mean what they
    mean in PEFT's own LoRA.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    slots: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] | None = None
    router: dict[str, Any] | None = None
    dropout: float = 0.0
    labels: list[str] | None = None
    pad_token_id: int | None = None
    quantise: str | None = None
    base_identity: dict[str, Any] | None = None
    asked: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = Kind.FEDALT
        self.plan()  # a wrong one is an error here, not in the middle of a model

    def plan(self) -> Plan:
        """Slots, how they combine, and dropout."""
        for slot in self.slots:
            if slot.keys() != {"name", "rank", "alpha"}:
                raise ValueError(f"a slot has name, rank and alpha, but here is {slot}")
        combine: Sum | Mixer | Router = Mixer()
        if self.router is not None:
            combine = Router(**self.router)
        elif self.weights is not None:
            combine = Sum(tuple(self.weights))
        return Plan(tuple(Slot(**slot) for slot in self.slots), combine, self.dropout)


def key_of(name: Name) -> str:
    """What a tensor is called within its site.

    Slot and factor in one part, because PEFT takes an adapter's name out of a key, and puts it
    back, only right before the key's last part.
    """
    return f"{name.slot}_{name.factor}"


class FedALTLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer and, per PEFT adapter, the slots of one client beside it."""

    adapter_layer_names = (SLOTS,)
    other_param_names = ("fedalt_plans",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fedalt_slots = nn.ModuleDict()
        self.fedalt_plans: dict[str, Plan] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, plan: Plan) -> None:
        """Make room for an adapter, which changes nothing until it is trained or loaded."""
        device = cast(Tensor, self.base_layer.weight).device
        factors = nn.ParameterDict()
        for name, shape in plan.shapes({"": shape_of(self.base_layer)}).items():
            # float32 also over a base of lower precision: small updates would get lost
            tensor = torch.zeros(shape, device=device, dtype=torch.float32)
            if name.factor != "B":
                nn.init.uniform_(tensor, -(shape[-1] ** -0.5), shape[-1] ** -0.5)
            factors[key_of(name)] = nn.Parameter(tensor)
        self.fedalt_slots[adapter_name] = factors
        self.fedalt_plans[adapter_name] = plan

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., d_in) -> (batch, ..., d_out); several active adapters add up."""
        y: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return y
        for adapter_name in cast(list[str], self.active_adapters):
            if adapter_name in self.fedalt_plans:
                y = self._adapt(adapter_name, x, y)
        return y

    def _adapt(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        plan = self.fedalt_plans[adapter_name]
        combine, gate = plan.combine, plan.gate
        factors = cast(nn.ParameterDict, self.fedalt_slots[adapter_name])
        combination = Combination(
            ranks=tuple(slot.rank for slot in plan.slots),
            scalings=tuple(slot.scaling for slot in plan.slots),
            weights=combine.weights if isinstance(combine, Sum) else None,
            router=combine if isinstance(combine, Router) else None,
        )

        def of(slot: str, factor: str) -> Tensor:
            tensor: Tensor = factors[key_of(Name("", slot, factor))]
            return tensor[None]  # one client

        rows = x.reshape(1, -1, x.shape[-1])
        keep = None
        if self.training and plan.dropout:
            keep = functional.dropout(torch.ones_like(rows, dtype=y.dtype), plan.dropout)
        out = add_low_rank(
            y.reshape(1, -1, y.shape[-1]),
            rows,
            keep,
            combination,
            (
                [of(slot.name, "A") for slot in plan.slots],
                [of(slot.name, "B") for slot in plan.slots],
                None if gate is None else of(gate[0], "G"),
            ),
        )
        return out.reshape(y.shape)

    def merge(
        self,
        safe_merge: bool = False,  # noqa: ARG002 - PEFT's signature
        adapter_names: list[str] | None = None,
    ) -> None:
        """Refuse: no frozen weight does what a mixer or a router does."""
        wanted = cast(list[str], self.active_adapters) if adapter_names is None else adapter_names
        mixed = {n: gate for n in wanted if (gate := self.fedalt_plans[n].gate) is not None}
        first = next(iter(mixed or wanted))
        raise ValueError(
            f"adapter {first!r} cannot be merged into the base model: "
            + (f"its {mixed[first][0]} weighs the slots anew for every token; " if mixed else "")
            + "a single slot exported as LoRA can"
        )

    def unmerge(self) -> None:
        """Nothing ever is merged."""
        raise ValueError("no adapter is merged, because none of this type can be")


class FedALTTuner(BaseTuner):  # type: ignore[misc]
    """Puts the layers into a model; all else is PEFT's own."""

    prefix = PREFIX
    tuner_layer_cls = FedALTLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: FedALTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002 - PEFT's signature
    ) -> None:
        if not isinstance(target, FedALTLayer | nn.Linear | Conv1D):
            raise ValueError(
                f"{current_key} is a {type(target).__name__}, but only linear layers are adapted"
            )
        layer = target if isinstance(target, FedALTLayer) else FedALTLayer(target)
        layer.add(adapter_name, peft_config.plan())
        setattr(parent, target_name, layer)


def register() -> None:
    """Make PEFT know the type; doing it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[Kind.FEDALT] = FedALTConfig
    PEFT_TYPE_TO_TUNER_MAPPING[Kind.FEDALT] = FedALTTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[Kind.FEDALT] = PREFIX
