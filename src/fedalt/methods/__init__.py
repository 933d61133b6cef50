"""One file per published method, or per family of them; METHODS alone lists them."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fedalt.methods.contract import AnyMethod

# Every method: its module, its class, and what differs from the defaults of the class. Where
# several are settings of one class, its field `variant` tells them apart, and nothing else sets it.
_METHODS: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "fedalt": ("fedalt", "FedALT", {}),
    "fedalt_select": ("fedalt_select", "FedALTSelect", {}),
    "fedit": ("fedit", "FedIT", {}),
    "local": ("local", "LocalOnly", {}),
    "fedlease": ("fedlease", "FedLEASE", {}),
    "fedit_split": ("fedit_split", "FedITSplit", {}),
    "ffa_lora": ("shared_factors", "SharedFactors", {"variant": "ffa_lora"}),
    "fedsa_lora": ("shared_factors", "SharedFactors", {"variant": "fedsa_lora"}),
    "rolora": ("shared_factors", "SharedFactors", {"variant": "rolora"}),
    "flexlora": ("unequal_ranks", "UnequalRanks", {"variant": "flexlora", "split": "in_b"}),
    "florist": (
        "unequal_ranks",
        "UnequalRanks",
        {"variant": "florist", "tau": 0.95, "split": "in_b"},
    ),
    "hetlora_mean": ("unequal_ranks", "UnequalRanks", {"variant": "hetlora_mean"}),
    "feddpa": ("feddpa", "FedDPA", {}),
    "fdlora": ("fdlora", "FDLoRA", {}),
    "pf2lora": ("pf2lora", "PF2LoRA", {}),
    "fedlora_optimizer": ("fedlora_optimizer", "FedLoRAOptimizer", {}),
}


@cache
def _made(name: str) -> "AnyMethod":
    module, kind, values = _METHODS[name]
    method: AnyMethod = getattr(import_module(f"fedalt.methods.{module}"), kind)(**values)
    return method


class _Methods(Mapping[str, "AnyMethod"]):
    """A method is imported, and torch with it, when it is asked for; its name is not."""

    def __getitem__(self, name: str) -> "AnyMethod":
        return _made(name)

    def __contains__(self, name: object) -> bool:
        return name in _METHODS

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


METHODS: Final = _Methods()
