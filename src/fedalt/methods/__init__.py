"""One file per published method, or per family of them; METHODS alone lists them."""

from typing import Final

from fedalt.methods.entries import Entry, Methods

METHODS: Final = Methods(
    {
        "fedalt": Entry("fedalt", "FedALT", ablations=Entry("fedalt_ablations", "FedALTAblations")),
        "fedalt_select": Entry("fedalt_select", "FedALTSelect"),
        "fedit": Entry("fedit", "FedIT"),
        "local": Entry("local", "LocalOnly", local_only=True),
        "fedlease": Entry("fedlease", "FedLEASE"),
        "fedit_split": Entry("fedit_split", "FedITSplit"),
        "ffa_lora": Entry("shared_factors", "SharedFactors", {"variant": "ffa_lora"}),
        "fedsa_lora": Entry("shared_factors", "SharedFactors", {"variant": "fedsa_lora"}),
        "rolora": Entry("shared_factors", "SharedFactors", {"variant": "rolora"}),
        "flexlora": Entry(
            "unequal_ranks", "UnequalRanks", {"variant": "flexlora", "split": "in_b"}
        ),
        "florist": Entry(
            "unequal_ranks", "UnequalRanks", {"variant": "florist", "tau": 0.95, "split": "in_b"}
        ),
        "owner_mean": Entry("unequal_ranks", "UnequalRanks", {"variant": "owner_mean"}),
        "hetlora": Entry("hetlora", "HetLoRA"),
        "fedilora": Entry("fedilora", "FediLoRA"),
        "flora": Entry("flora", "FLoRA"),
        "fedex_lora": Entry("fedex_lora", "FedExLoRA"),
        "fslora": Entry("fslora", "FSLoRA"),
        "feddpa": Entry("feddpa", "FedDPA"),
        "fdlora": Entry("fdlora", "FDLoRA"),
        "pf2lora": Entry("pf2lora", "PF2LoRA"),
        "fedlora_optimizer": Entry("fedlora_optimizer", "FedLoRAOptimizer"),
        "ifca_lora": Entry("ifca_lora", "IFCALoRA"),
        "lora_fair": Entry("lora_fair", "LoRAFAIR"),
        "hilora": Entry("hilora", "HiLoRA"),
        "fedtree_lora": Entry("fedtree_lora", "FedTreeLoRA"),
    }
)
# What a method was called before.
RENAMED: Final = {"hetlora_mean": "owner_mean"}
