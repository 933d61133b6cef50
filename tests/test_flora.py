"""FLoRA: the stack is the exact sum, it joins the frozen side, and everybody starts anew."""

import pytest
import torch
from federation import EXAMPLES, SITES, START, MemoryStates, pull, served, simulate

from fedalt.adapters.initializer import drawn_again
from fedalt.core import tree as trees
from fedalt.core.tree import Name
from fedalt.engine.firewall import Refused, check_broadcast
from fedalt.methods.contract import Message
from fedalt.methods.flora import FLoRA
from fedalt.methods.frozen_side import FROZEN, added, alone, on_top
from fedalt.methods.lora import Lora
from fedalt.methods.low_rank_sums import Pair
from fedalt.methods.own_ranks import SHARED

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FLoRA(lora=LORA, ranks={"a": 1, "b": 3})


def product(tree, site, slot):
    a, b = (tree[Name(site, slot, factor)].double() for factor in "AB")
    return b @ a


def watched(method, cohorts, states=None):
    """The states afterwards, and for every round what each client began with and ended with."""
    fits = []

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        fits.append((client_id, order, fitted.tree))
        return fitted

    states, costs = simulate(method, cohorts, states, train=watch)
    return states, fits, costs


def test_a_sum_by_hand_and_its_rank():
    # [1 0] below B = (1, 0) and [0 2] below (0, 1): the diagonal (1, 2), with weight 1/2.
    one = Pair(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    two = Pair(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
    stack = Pair(torch.cat([one.b, two.b], 1), torch.cat([one.a, two.a]))
    frozen = added({}, {"x": stack}, 0.5)
    wanted = torch.tensor([[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]]).double()
    torch.testing.assert_close(product(frozen, "x", FROZEN), wanted)
    assert frozen[Name("x", FROZEN, "A")].shape == (2, 3)
    # The same again: twice the matrix, still of rank 2; and taken away, nothing is left.
    again = added(frozen, {"x": stack}, 0.5)
    torch.testing.assert_close(product(again, "x", FROZEN), 2 * wanted)
    assert again[Name("x", FROZEN, "A")].shape == (2, 3)
    assert added(again, {"x": stack}, -1.0) == {}


def test_sites_of_different_rank_become_one_slot_with_rows_of_zeros():
    a = torch.eye(3)
    frozen = {
        Name("x", FROZEN, "A"): a[:1],
        Name("x", FROZEN, "B"): torch.ones(2, 1),
        Name("y", FROZEN, "A"): a[:2],
        Name("y", FROZEN, "B"): torch.ones(4, 2),
    }
    serving = alone(frozen, 2.0, {}, 0.0)
    (slot,) = serving.plan.slots
    assert (slot.name, slot.rank, slot.scaling) == (FROZEN, 2, 2.0)
    for site in "xy":
        assert torch.equal(product(serving.tree, site, FROZEN), product(frozen, site, FROZEN))
    both = on_top(frozen, LORA.slot(SHARED), {}, {}, 0.0)
    assert [each.scaling for each in both.plan.slots] == [2.0, 2.0]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_what_is_served_is_the_exact_sum_of_unequal_ranks(weighting):
    method = FLoRA(lora=LORA, ranks={"a": 1, "b": 3}, weighting=weighting)
    states, fits, _ = watched(method, [("a", "b", "c")])
    weights = EXAMPLES if weighting == "examples" else dict.fromkeys(EXAMPLES, 1)
    for serving in served(method, states, "abc").values():
        (slot,) = serving.plan.slots
        assert slot.scaling == LORA.slot(SHARED).scaling
        for site in SITES:
            exact = sum(weights[k] * product(tree, site, SHARED) for k, _, tree in fits)
            exact /= sum(weights.values())
            found = product(serving.tree, site, FROZEN)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_every_round_adds_to_what_the_clients_trained_on():
    states, first, _ = watched(METHOD, [("a", "b", "c")])
    before = states["server"].frozen
    states, second, _ = watched(METHOD, [("a", "c")], states)
    for site in SITES:
        for _, order, _ in second:
            torch.testing.assert_close(
                product(order.tree, site, FROZEN), product(before, site, FROZEN)
            )
        mean = sum(product(tree, site, SHARED) for _, _, tree in second) / 2
        now = product(states["server"].frozen, site, FROZEN)
        torch.testing.assert_close(now, product(before, site, FROZEN) + mean, rtol=0, atol=1e-5)
    assert all(order.plan.slots[0].rank == {"a": 1, "b": 3, "c": 2}[k] for k, order, _ in first)


def test_all_start_anew_in_every_round_and_from_the_same_draw():
    _, fits, _ = watched(METHOD, [("a", "b", "c")] * 3)
    drawn = [
        {
            client: order.tree[Name("block.0.q", SHARED, "A")]
            for client, order, _ in fits[3 * at : 3 * at + 3]
        }
        for at in range(3)
    ]
    for client, order, _ in fits:
        for site in SITES:
            assert not order.tree[Name(site, SHARED, "B")].any()
        assert {name.slot for name in order.train} == {SHARED, "head"}, client
    first = START.adapter(LORA.slot(SHARED))[Name("block.0.q", SHARED, "A")]
    assert torch.equal(drawn[0]["c"], first)
    for at in range(3):
        assert torch.equal(drawn[at]["c"][:1], drawn[at]["a"])
        assert torch.equal(drawn[at]["b"][:2], drawn[at]["c"])
        assert at == 0 or not torch.equal(drawn[at]["c"], drawn[at - 1]["c"])
        assert drawn[at]["c"].abs().max() <= 5**-0.5


def test_a_draw_is_told_by_seed_and_round_alone():
    adapter = START.adapter(LORA.slot(SHARED))
    assert trees.equal(drawn_again(adapter, 7, 0), adapter)
    assert trees.equal(drawn_again(adapter, 7, 2), drawn_again(adapter, 7, 2))
    assert not trees.equal(drawn_again(adapter, 7, 2), drawn_again(adapter, 8, 2))


def test_the_rank_of_the_sum_ends_at_the_smaller_side_of_a_site():
    states = MemoryStates()
    for _ in range(4):
        simulate(METHOD, [("a", "b", "c")] * 2, states)
        for site, shape in SITES.items():
            assert len(states["server"].frozen[Name(site, FROZEN, "A")]) <= min(shape)
    assert len(states["server"].frozen[Name("block.1.q", FROZEN, "A")]) == 3


def test_who_was_away_gets_all_that_was_added():
    states, _ = simulate(METHOD, [("a", "b")] * 3)
    serving = served(METHOD, states, ["c"])["c"]
    for site in SITES:
        torch.testing.assert_close(
            product(serving.tree, site, FROZEN), product(states["server"].frozen, site, FROZEN)
        )


def test_a_frozen_side_of_more_rank_than_a_site_can_have_is_refused():
    client = METHOD.init_client(START, "a")
    tree = {Name("block.0.q", FROZEN, "A"): torch.ones(5, 5)}
    tree[Name("block.0.q", FROZEN, "B")] = torch.ones(4, 5)
    with pytest.raises(Refused, match="has rank 5, but at most 4"):
        check_broadcast(Message(tree, {"round": 1}), METHOD, START, client)


def test_before_the_first_round_a_client_serves_what_everybody_draws():
    tree = served(METHOD, MemoryStates(), ["c"])["c"].tree
    assert trees.equal(trees.select(tree, SHARED), START.adapter(LORA.slot(SHARED)))


def test_bytes_are_a_clients_rank_up_and_the_rank_of_the_sum_down():
    _, _, costs = watched(METHOD, [("a", "b", "c")] * 2)
    size = sum(d_in + d_out for d_in, d_out in SITES.values())
    whole = sum(min(shape) * sum(shape) for shape in SITES.values())  # rank 6, cut to 4 and 3
    for cost, rank in zip(costs, (1, 3, 2) * 2, strict=True):
        assert 0 < cost.upload_bytes - 4 * rank * size < 4000
    for cost in costs[3:]:
        assert 0 < cost.download_bytes - 4 * whole < 4000
