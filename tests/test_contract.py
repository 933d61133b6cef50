"""What every method must hold to. A new method adds rows here, not a copy of the tests."""

import copy

import pytest
import torch
from federation import (
    START,
    ByteStates,
    assert_same_servings,
    pull,
    run_one,
    served,
    servings,
    simulate,
    trees_of,
)

from fedalt.adapters.plan import HEAD, MIXER, ROUTER
from fedalt.core import tree as trees
from fedalt.engine.states import client_of, server_of
from fedalt.engine.traffic import Traffic
from fedalt.methods import METHODS
from fedalt.methods.contract import AnyMethod
from fedalt.methods.fdlora import FDLoRA
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedalt_ablations import FedALTAblations
from fedalt.methods.fedalt_select import FedALTSelect
from fedalt.methods.feddpa import FedDPA
from fedalt.methods.fedex_lora import FedExLoRA
from fedalt.methods.fedilora import FediLoRA
from fedalt.methods.fedit import FedIT
from fedalt.methods.fedit_split import FedITSplit
from fedalt.methods.fedlease import FedLEASE
from fedalt.methods.fedlora_optimizer import FedLoRAOptimizer
from fedalt.methods.fedtree_lora import FedTreeLoRA
from fedalt.methods.flora import FLoRA
from fedalt.methods.fslora import FSLoRA
from fedalt.methods.hetlora import HetLoRA
from fedalt.methods.hilora import HiLoRA
from fedalt.methods.ifca_lora import IFCALoRA
from fedalt.methods.local import LocalOnly
from fedalt.methods.lora import Lora
from fedalt.methods.lora_fair import LoRAFAIR
from fedalt.methods.pf2lora import PF2LoRA
from fedalt.methods.shared_factors import SharedFactors
from fedalt.methods.unequal_ranks import UnequalRanks
from fedalt.runs.settings import method_name
from fedalt.training.orders import Fit, Search

SMALL = Lora(rank=2, alpha=4, dropout=0.0)
RANKS = {"a": 1, "b": 3, "z": 1, "y": 3}  # z and y stand for a and b where clients are renamed
ROWS: dict[str, AnyMethod] = {
    "fedalt": FedALT(lora=SMALL),
    "fedalt, by examples": FedALT(lora=SMALL, weighting="examples"),
    "fedalt, row update": FedALTAblations(lora=SMALL, train_row=True),
    "fedalt, global mean": FedALTAblations(lora=SMALL, row="global_mean"),
    "fedalt, half": FedALTAblations(lora=SMALL, gate="half"),
    "fedalt, 1/K": FedALTAblations(lora=SMALL, gate="one_over_clients"),
    "fedalt, shared mixer": FedALTAblations(lora=SMALL, share_mixer=True),
    "fedalt, frozen A": FedALTAblations(lora=SMALL, freeze_a=True),
    "fedalt, own starts": FedALTAblations(lora=SMALL, shared_start=False, mixer_init="zeros"),
    "fedalt select": FedALTSelect(lora=SMALL),
    "fedalt select, all": FedALTSelect(lora=SMALL, tau=-1.0, gap=2.0, width=0.1, alone=1),
    "fedalt select, factors": FedALTSelect(
        lora=SMALL, tau=-1.0, gap=2.0, width=2.0, mean="factors"
    ),
    "fedalt select, beside": FedALTSelect(lora=SMALL, tau=-1.0, gap=2.0, alone=1, beside=True),
    "fedit": FedIT(lora=SMALL),
    "fedit, by examples": FedIT(lora=SMALL, weighting="examples"),
    "local": LocalOnly(lora=SMALL),
    "fedlease": FedLEASE(lora=SMALL),
    "fedlease, two experts": FedLEASE(lora=SMALL, warm_up=1),
    "fedlease, by examples": FedLEASE(lora=SMALL, warm_up=1, weighting="examples", signal="BA"),
    "fedlease, code": FedLEASE(lora=SMALL, warm_up=1, layout="code", renormalise=False),
    "fedlease, private router": FedLEASE(lora=SMALL, warm_up=1, share_router=False),
    "fedlease, one expert": FedLEASE(lora=SMALL, warm_up=1, max_experts=1, share_router=False),
    "fedlease, warm-up only": FedLEASE(lora=SMALL, warm_up=9),
    "fedit split": FedITSplit(lora=SMALL),
    "fedit split, mixer": FedITSplit(lora=SMALL, mixer=True, weighting="examples"),
    "ffa-lora": SharedFactors(variant="ffa_lora", lora=SMALL),
    "fedsa-lora": SharedFactors(variant="fedsa_lora", lora=SMALL, weighting="examples"),
    "rolora": SharedFactors(variant="rolora", lora=SMALL),
    "flexlora": UnequalRanks(variant="flexlora", lora=SMALL, ranks=RANKS),
    "flexlora, split": UnequalRanks(variant="flexlora", lora=SMALL, ranks=RANKS, split="balanced"),
    "florist": UnequalRanks(
        variant="florist", lora=SMALL, ranks=RANKS, tau=0.95, weighting="examples"
    ),
    "owner mean": UnequalRanks(variant="owner_mean", lora=SMALL, ranks=RANKS),
    "owner mean, equal ranks": UnequalRanks(variant="owner_mean", lora=SMALL),
    "hetlora": HetLoRA(lora=SMALL, ranks=RANKS),
    "fedilora": FediLoRA(lora=SMALL, ranks=RANKS),
    "fedilora, by examples": FediLoRA(lora=SMALL, limit=0.0, weighting="examples"),
    "flora": FLoRA(lora=SMALL, ranks=RANKS),
    "flora, by examples": FLoRA(lora=SMALL, weighting="examples"),
    "fedex-lora": FedExLoRA(lora=SMALL),
    "fedex-lora, by examples": FedExLoRA(lora=SMALL, weighting="examples"),
    "fslora": FSLoRA(lora=SMALL, ranks=RANKS, weighting="examples"),
    "fslora, whole": FSLoRA(lora=SMALL, whole_rank=2),
    "feddpa": FedDPA(lora=SMALL),
    "feddpa, tail": FedDPA(lora=SMALL, schedule="F", weighting="examples"),
    "feddpa, on shared": FedDPA(lora=SMALL, similarity_on="shared"),
    "fdlora": FDLoRA(lora=SMALL),
    "fdlora, heavy ball": FDLoRA(lora=SMALL, outer="heavy_ball", weighting="examples"),
    "fdlora, sync": FDLoRA(lora=SMALL, sync_every=2, carry_inner=False),
    "pf2lora": PF2LoRA(lora=SMALL, client_rank=1),
    "pf2lora, by examples": PF2LoRA(lora=SMALL, weighting="examples", hypergradient="first_order"),
    "fedlora optimizer": FedLoRAOptimizer(lora=SMALL),
    "fedlora optimizer, columns": FedLoRAOptimizer(
        lora=SMALL, a_axis="column", global_rounds=2, weighting="examples"
    ),
    "ifca lora": IFCALoRA(lora=SMALL),
    "ifca lora, by examples": IFCALoRA(lora=SMALL, groups=2, weighting="examples"),
    "ifca lora, one group": IFCALoRA(lora=SMALL, groups=1),
    "lora-fair": LoRAFAIR(lora=SMALL),
    "lora-fair, by examples": LoRAFAIR(lora=SMALL, ridge=1.0, weighting="examples"),
    "hilora": HiLoRA(lora=SMALL),
    "hilora, all stages": HiLoRA(lora=SMALL, root_rounds=1, cluster_rounds=1),
    "hilora, leaves at once": HiLoRA(
        lora=SMALL, root_rounds=1, cluster_rounds=0, max_clusters=1, weighting="examples"
    ),
    "fedtree-lora": FedTreeLoRA(lora=SMALL),
    "fedtree-lora, wide": FedTreeLoRA(lora=SMALL, warm_up=1, width=3, one_group=-1.0),
    "fedtree-lora, one group": FedTreeLoRA(lora=SMALL, warm_up=1, width=1, weighting="examples"),
    "fedtree-lora, warm-up only": FedTreeLoRA(lora=SMALL, warm_up=9),
}
ALL = ("a", "b", "c")
COHORTS = [ALL, ("a", "c"), ("b",), ALL]

each_method = pytest.mark.parametrize("method", ROWS.values(), ids=ROWS.keys())


def test_every_method_has_a_row():
    assert {method_name(method) for method in ROWS.values()} == METHODS.keys()


@each_method
def test_a_run_is_the_same_over_bytes(method):
    straight, _ = simulate(method, COHORTS)
    over_bytes, _ = simulate(method, COHORTS, ByteStates())
    assert_same_servings(served(method, straight, ALL), served(method, over_bytes, ALL))


@each_method
def test_a_resumed_run_equals_a_straight_one(method):
    straight, _ = simulate(method, COHORTS)
    first, _ = simulate(method, COHORTS[:2], ByteStates())
    resumed, _ = simulate(method, COHORTS[2:], copy.deepcopy(first))
    assert_same_servings(served(method, straight, ALL), served(method, resumed, ALL))


@each_method
def test_changes_in_int8_are_read_by_everyone(method):
    int8 = Traffic(upload="int8", download="int8")
    states, costs = simulate(method, COHORTS, ByteStates(), traffic=int8)
    assert not any(cost.refused for cost in costs)
    for serving in served(method, states, [*ALL, "newcomer"], traffic=int8).values():
        assert all(tensor.isfinite().all() for tensor in serving.tree.values())


@each_method
def test_the_order_of_the_clients_changes_nothing(method):
    names = {"a": "z", "b": "y", "c": "x"}
    back = {new: old for old, new in names.items()}
    straight, _ = simulate(method, COHORTS)

    def as_before(client, number, order):
        return pull(back[client], number, order)

    cohorts = [[names[client] for client in cohort] for cohort in COHORTS]
    renamed, _ = simulate(method, cohorts, train=as_before)
    found = served(method, renamed, list(back), as_before)
    # What a client's name draws is another client's under another name.
    draws_by_name = not getattr(method, "shared_start", True) or isinstance(method, FSLoRA)
    if not draws_by_name:
        expected = served(method, straight, ALL)
        assert_same_servings(expected, {back[new]: found[new] for new in found}, 1e-5)


@each_method
def test_only_declared_tensors_are_ordered_to_train_and_plans_fit_their_trees(method):
    orders = []

    def watch(client_id, number, order):
        orders.append(order)
        return pull(client_id, number, order)

    states, _ = simulate(method, COHORTS, train=watch)
    in_rounds = len(orders)
    assert in_rounds
    served(method, states, ALL, watch)
    for at, order in enumerate(orders):
        if isinstance(order, Search):
            bound = order.tree_of(order.start)
        else:
            bound = order.compose(order.tree) if isinstance(order, Fit) else order.tree
        needed = {**order.plan.shapes(START.sites), **START.heads}
        assert {name: tuple(tensor.shape) for name, tensor in bound.items()} == needed
        if not isinstance(order, Fit):
            continue
        assert order.train <= order.tree.keys()
        assert all(tensor.dtype == torch.float32 for tensor in order.tree.values())
        if at < in_rounds:  # what trains before it serves may leave the head as the rounds made it
            assert {name for name in order.tree if name.slot == HEAD} <= order.train


@each_method
def test_an_upload_holds_nothing_private(method):
    states, _ = simulate(method, COHORTS)
    message = method.broadcast(server_of(method, START, states), "a")
    client = client_of(method, START, states, "a")
    _, upload = run_one(method.local(client, message), pull, "a")
    slots = {name.slot for name in upload.tree}
    assert HEAD not in slots
    averages_mixers = getattr(method, "share_mixer", False) or getattr(method, "mixer", False)
    assert averages_mixers or MIXER not in slots
    assert getattr(method, "share_router", False) or ROUTER not in slots
    assert "client" not in upload.facts


@each_method
def test_serving_leaves_the_states_alone(method):
    states, _ = simulate(method, COHORTS)
    before = copy.deepcopy(dict(states))
    served(method, states, ALL)
    assert states.keys() == before.keys()
    for key, state in states.items():
        assert trees.equal(trees_of(state), trees_of(before[key]))


@each_method
def test_local_training_leaves_its_inputs_alone(method):
    states, _ = simulate(method, COHORTS)
    before = copy.deepcopy(dict(states))
    message = method.broadcast(server_of(method, START, states), "a")
    client = client_of(method, START, states, "a")
    run_one(method.local(client, message), pull, "a")
    assert trees.equal(trees_of(client), trees_of(before["clients/a"]))
    assert trees.equal(trees_of(states["server"]), trees_of(before["server"]))


@each_method
@pytest.mark.parametrize("clients", [("a",), ("a", "b")], ids=["one client", "two clients"])
def test_small_federations_run(method, clients):
    states, _ = simulate(method, [clients] * 3)
    for serving in served(method, states, clients).values():
        assert all(tensor.isfinite().all() for tensor in serving.tree.values())


@each_method
def test_a_client_that_never_trained_can_be_served(method):
    states, _ = simulate(method, [("a", "b")] * 2)
    serving = served(method, states, ["newcomer"])["newcomer"]
    needed = {**serving.plan.shapes(START.sites), **START.heads}
    assert {name: tuple(tensor.shape) for name, tensor in serving.tree.items()} == needed


@each_method
def test_an_absent_client_keeps_its_state(method):
    states, _ = simulate(method, [ALL])
    before = trees_of(states["clients/b"])
    simulate(method, [("a", "c")], states)
    assert trees.equal(trees_of(states["clients/b"]), before)


@each_method
def test_the_shared_part_alone_fits_its_plan(method):
    states, _ = simulate(method, COHORTS)
    shared = servings(method, START, states, "a", pull)[1]
    if shared is not None:
        needed = {**shared.plan.shapes(START.sites), **START.heads}
        assert {name: tuple(tensor.shape) for name, tensor in shared.tree.items()} == needed
