"""One file per published method, or per family of them; METHODS alone lists them."""

from collections.abc import Mapping

from fedalt.methods.contract import AnyMethod
from fedalt.methods.fdlora import FDLoRA
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedalt_select import FedALTSelect
from fedalt.methods.feddpa import FedDPA
from fedalt.methods.fedit import FedIT
from fedalt.methods.fedit_split import FedITSplit
from fedalt.methods.fedlease import FedLEASE
from fedalt.methods.fedlora_optimizer import FedLoRAOptimizer
from fedalt.methods.local import LocalOnly
from fedalt.methods.pf2lora import PF2LoRA
from fedalt.methods.shared_factors import SharedFactors
from fedalt.methods.unequal_ranks import UnequalRanks

# Every method with its defaults. Where several are settings of one class, its field `variant`
# tells them apart, and nothing else sets that.
METHODS: Mapping[str, AnyMethod] = {
    "fedalt": FedALT(),
    "fedalt_select": FedALTSelect(),
    "fedit": FedIT(),
    "local": LocalOnly(),
    "fedlease": FedLEASE(),
    "fedit_split": FedITSplit(),
    "ffa_lora": SharedFactors(variant="ffa_lora"),
    "fedsa_lora": SharedFactors(variant="fedsa_lora"),
    "rolora": SharedFactors(variant="rolora"),
    "flexlora": UnequalRanks(variant="flexlora", split="in_b"),
    "florist": UnequalRanks(variant="florist", tau=0.95, split="in_b"),
    "hetlora_mean": UnequalRanks(variant="hetlora_mean"),
    "feddpa": FedDPA(),
    "fdlora": FDLoRA(),
    "pf2lora": PF2LoRA(),
    "fedlora_optimizer": FedLoRAOptimizer(),
}
