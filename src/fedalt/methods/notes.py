"""What has to be said beside a table that a method's scores stand in."""

from collections.abc import Iterator

from fedalt.methods.contract import AnyMethod
from fedalt.methods.fdlora import FDLoRA
from fedalt.methods.fedalt_select import FedALTSelect
from fedalt.methods.feddpa import FedDPA
from fedalt.methods.fedlease import FedLEASE
from fedalt.methods.fedlora_optimizer import FedLoRAOptimizer
from fedalt.methods.fedtree_lora import FedTreeLoRA
from fedalt.methods.hetlora import HetLoRA
from fedalt.methods.hilora import HiLoRA
from fedalt.methods.ifca_lora import IFCALoRA
from fedalt.methods.shared_factors import SharedFactors
from fedalt.methods.unequal_ranks import UnequalRanks


def notes_on(method: AnyMethod, rounds: int) -> Iterator[str]:
    """Sentences on choices that nobody else's table has, and on what a run is too short for.

    `rounds` is how many the run has.
    """
    match method:
        case FDLoRA(sync_every=h) if rounds <= h:
            yield (
                f"with sync_every = {h} no client ever copies the global adapter in a run of "
                f"{rounds} rounds: its individual adapter is that of the first round"
            )
        case FedLEASE(warm_up=w) if rounds <= w:
            yield f"all {rounds} rounds are its warm-up: no group has trained"
        case FedALTSelect(alone=a) if rounds <= a:
            yield f"all {rounds} rounds are alone: nobody has listened to anybody"
        case FedDPA(schedule="T") if rounds < 2:
            yield "its individual phase begins in the second round, which there is not"
        case SharedFactors(variant="rolora") if rounds < 2:
            yield "its A would first be trained in the second round, which there is not"
        case FedLoRAOptimizer(personal_epochs=epochs):
            yield (
                f"a client that serves has trained the lengths of its B alone for {epochs} more "
                "epochs, never its head"
            )
            if rounds < 2 and method.global_rounds:
                yield "its global stage begins in the second round, which there is not"
        case HetLoRA():
            yield "its clients keep their ranks: when the published ones prune theirs is not known"
        case IFCALoRA(groups=m) if m > 1 and rounds < 2:
            yield "its adapters are first chosen among in the second round, which there is not"
        case HiLoRA(root_rounds=r) if rounds <= r:
            yield f"all {rounds} rounds are its root stage: no cluster and no leaf has trained"
        case HiLoRA(root_rounds=r, cluster_rounds=c) if rounds <= r + c:
            yield f"with {r} rounds for its root and {c} for clusters, no leaf has trained"
        case FedTreeLoRA(warm_up=w) if rounds <= w:
            yield f"all {rounds} rounds are its warm-up: no group has trained"
        case UnequalRanks(variant="florist"):
            split = "are split evenly between A and B" if method.split == "balanced" else "lie in B"
            yield f"its singular values {split}; which of the two is the published one is not known"
