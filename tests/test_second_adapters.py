"""A client that trains two adapters begins with two draws; who trains one, with the old draw."""

import pytest
import torch
from bases import base_of, example, start_of, train
from federation import pull, served, simulate
from test_contract import ALL, ROWS

from fedalt.adapters.plan import Slot
from fedalt.core.tree import Name, equal
from fedalt.methods.fedalt import REST_OF_WORLD
from fedalt.methods.fedalt_ablations import FedALTAblations
from fedalt.methods.feddpa import INDIVIDUAL, SHARED, FedDPA
from fedalt.methods.fedit import FedIT
from fedalt.methods.lora import Lora
from fedalt.methods.pf2lora import PF2LoRA
from fedalt.training.group import Training
from fedalt.training.orders import Fit

LORA = Lora(rank=3, alpha=6, dropout=0.0)
EXAMPLES = [example("ab c", "xy"), example("dd", "z"), example("abc", "q"), example("e f", "xx")]


@pytest.mark.parametrize("method", ROWS.values(), ids=ROWS.keys())
def test_no_two_adapters_of_a_client_begin_their_training_alike(method):
    first: dict[Name, torch.Tensor] = {}

    def watch(client_id, number, order):
        if isinstance(order, Fit) and client_id == "a":
            for name in order.train:
                if name.factor == "A":
                    first.setdefault(name, order.tree[name].clone())
        return pull(client_id, number, order)

    states, _ = simulate(method, [ALL] * 3, train=watch)
    served(method, states, ["a"], watch)
    names = sorted(first)
    for at, name in enumerate(names):
        for other in names[:at]:
            if (other.site, first[other].shape) == (name.site, first[name].shape):
                assert not torch.equal(first[other], first[name]), (name, other)


def at_the_start(method, base):
    """The bound tree of a client's first order that trains two adapters, from the real start."""
    init = start_of(base)
    server, client = method.init_server(init), method.init_client(init, "a")
    return next(method.local(client, method.broadcast(server, "a")))


def rank_of(tree, site, *slots):
    total = sum(tree[Name(site, slot, "B")] @ tree[Name(site, slot, "A")] for slot in slots)
    values = torch.linalg.svdvals(total.double())
    return int((values > 1e-6 * values[0]).sum())


@pytest.mark.parametrize(
    ("method", "slots", "rank"),
    [
        (PF2LoRA(lora=LORA, client_rank=2), (SHARED, INDIVIDUAL), 5),
        (FedALTAblations(lora=LORA, train_row=True), (INDIVIDUAL, REST_OF_WORLD), 6),
        (FedALTAblations(lora=LORA, train_row=True, gate="half"), (INDIVIDUAL, REST_OF_WORLD), 6),
    ],
)
def test_two_adapters_that_train_side_by_side_span_the_sum_of_their_ranks(method, slots, rank):
    base = base_of()
    order = at_the_start(method, base)
    tree = train(base, order, EXAMPLES, Training(lr=1e-2, batch_size=2), seed=3).tree
    wide = [site for site, shape in base.adapted.sites.items() if min(shape) >= rank]
    assert wide
    assert {rank_of(tree, site, *slots) for site in wide} == {rank}


def test_the_individual_adapter_of_feddpa_shares_no_row_with_the_shared_one_it_begins_beside():
    init = start_of(base_of())
    method = FedDPA(lora=LORA)
    shared, own = method.init_server(init).adapter, method.init_client(init, "a").individual
    for name, tensor in shared.items():
        if name.factor == "A":
            both = torch.cat([tensor, own[name._replace(slot=INDIVIDUAL)]])
            assert torch.linalg.matrix_rank(both) == 6


def test_draws_apart_differ_by_slot_and_leave_all_other_draws_as_they_were():
    init = start_of(base_of())
    common = init.adapter(Slot("shared", 3, 6.0))
    apart = {each: init.adapter(Slot(each, 3, 6.0), apart=True) for each in ("shared", "other")}
    assert equal(FedIT(lora=LORA).init_server(init).adapter, common)
    for name, tensor in common.items():
        again, other = apart["shared"][name], apart["other"][name._replace(slot="other")]
        assert torch.equal(init.adapter(Slot("shared", 3, 6.0))[name], tensor)
        for left, right in ((tensor, again), (tensor, other), (again, other)):
            assert torch.equal(left, right) == (name.factor == "B")
    # The stream of an adapter that is alone is as it ever was: these are digits of earlier runs.
    site = min(init.sites)
    assert common[Name(site, "shared", "A")][0, 0].item() == pytest.approx(-0.12998503, abs=1e-7)
