"""The oracles of FedALT-select: who is heard and how much, exact sums, and when silence is kept."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from federation import SITES, START, pull, served, simulate

from fedalt.adapters.plan import HEAD, Sum
from fedalt.core import tree as trees
from fedalt.core.tree import Name, select
from fedalt.methods.contract import MemoryLedger, Message
from fedalt.methods.fedalt_select import (
    INDIVIDUAL,
    REST_OF_WORLD,
    FedALTSelect,
    Server,
)
from fedalt.methods.kin import kin_weights, similarities, sum_of_products
from fedalt.methods.local import LocalOnly
from fedalt.methods.lora import Lora
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FedALTSelect(lora=LORA)
EVERYBODY = FedALTSelect(lora=LORA, tau=-1.0, width=0.001, power=0.0)  # all heard alike
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())


def pair(b, a, slot=INDIVIDUAL, site="s"):
    """An adapter of one site."""
    return {
        Name(site, slot, "A"): torch.tensor(a, dtype=torch.float32),
        Name(site, slot, "B"): torch.tensor(b, dtype=torch.float32),
    }


def product(tree, slot, site):
    return tree[Name(site, slot, "B")].double() @ tree[Name(site, slot, "A")].double()


class Watch:
    """Carries orders out as told and keeps them by client."""

    def __init__(self, carry_out=pull):
        self.orders, self.carry_out = {}, carry_out

    def __call__(self, client_id, number, order):
        self.orders.setdefault(client_id, []).append(order)
        return self.carry_out(client_id, number, order)


def test_similarity_is_the_cosine_of_products_and_not_of_factors():
    # (1, 0) (2, 0) and (2, 0) (1, 0) are one product; (1, 1) (1, 0) is at 45 degrees to it.
    adapters = {
        "a": pair([[1.0], [0.0]], [[2.0, 0.0]]),
        "b": pair([[2.0], [0.0]], [[1.0, 0.0]]),
        "c": pair([[1.0], [1.0]], [[1.0, 0.0]]),
        "d": pair([[-3.0], [0.0]], [[1.0, 0.0]]),
    }
    found = similarities(adapters, {}, 0.9)
    assert found["a"] == pytest.approx({"b": 1.0, "c": 0.5**0.5, "d": -1.0})
    assert found["c"] == pytest.approx({"a": 0.5**0.5, "b": 0.5**0.5, "d": -(0.5**0.5)})


def test_similarity_is_a_mean_over_sites_and_over_rounds():
    def two(first, second):
        here = pair([[1.0], [0.0]], [[1.0, 0.0]])
        there = pair([[1.0], [0.0]], [[1.0, 0.0]], site="t")
        (one, other) = (
            pair([[up], [1 - up]], [[1.0, 0.0]], site=site)
            for site, up in (("s", first), ("t", second))
        )
        return {"a": {**here, **there}, "b": {**one, **other}}

    first = similarities(two(1.0, 0.0), {}, 0.75)  # the same on one site, at right angles on one
    assert first["a"]["b"] == pytest.approx(0.5)
    second = similarities(two(1.0, 1.0), first, 0.75)
    assert second["a"]["b"] == pytest.approx(0.75 * 0.5 + 0.25 * 1.0)
    untrained = {**two(1.0, 1.0), "new": pair([[0.0], [0.0]], [[1.0, 0.0]])}
    assert "new" not in similarities(untrained, first, 0.75)


@pytest.mark.parametrize(
    ("similar", "expected"),
    [
        ({"b": 0.6, "c": 0.4, "d": 0.1}, {"b": 2 / 3, "c": 1 / 3}),  # 0.4 and 0.2 above tau
        ({"b": 0.25, "c": 0.1}, {"b": 0.25}),  # 0.05 above it: a quarter of the width
        ({"b": 0.3, "c": 0.3}, {"b": 0.25, "c": 0.25}),  # half of the width, shared
        ({"b": 0.2, "c": -0.5}, {}),
        ({}, {}),
    ],
)
def test_weights_by_hand(similar, expected):
    found = kin_weights(similar, tau=0.2, width=0.2, power=1.0)
    assert found == pytest.approx(expected)


def test_a_higher_power_listens_to_the_nearest_and_none_to_all_alike():
    similar = {"b": 0.6, "c": 0.4}
    assert kin_weights(similar, tau=0.2, width=0.2, power=2.0) == pytest.approx(
        {"b": 0.8, "c": 0.2}
    )
    assert kin_weights(similar, tau=0.2, width=0.2, power=0.0) == pytest.approx(
        {"b": 0.5, "c": 0.5}
    )


def test_total_weight_grows_with_the_evidence_and_never_jumps():
    totals = [
        sum(kin_weights({"b": s / 100, "c": 0.1}, tau=0.2, width=0.35, power=1.0).values())
        for s in range(101)
    ]
    assert totals[:21] == [0.0] * 21
    assert all(0 <= after - before < 0.03 for before, after in pairwise(totals))
    assert totals[55] == pytest.approx(1.0)


def test_the_sum_of_products_is_exact_as_long_as_the_rank_holds_it():
    adapters = {
        "a": pair([[1.0], [0.0], [2.0]], [[1.0, 0.0, 1.0, 0.0]]),
        "b": pair([[0.0], [3.0], [1.0]], [[0.0, 2.0, 0.0, 1.0]]),
    }
    weights = {"a": 0.25, "b": 0.75}
    dense = sum(w * product(adapters[each], INDIVIDUAL, "s") for each, w in weights.items())
    for rank in (2, 3):
        found = sum_of_products(adapters, weights, REST_OF_WORLD, rank)
        assert found[Name("s", REST_OF_WORLD, "A")].shape == (rank, 4)
        torch.testing.assert_close(product(found, REST_OF_WORLD, "s"), dense, rtol=0, atol=1e-6)
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    cut = product(sum_of_products(adapters, weights, REST_OF_WORLD, 1), REST_OF_WORLD, "s")
    torch.testing.assert_close(cut, s[0] * u[:, :1] @ v[:1], rtol=0, atol=1e-6)


def of_groups(client_id, number, order):
    """A and b learn one thing, c another that shares nothing with it."""
    tree = dict(order.tree)
    side = slice(0, 2) if client_id in "ab" else slice(2, 4)
    for name in order.train:
        if name.slot != HEAD:
            moved = torch.zeros_like(tree[name])
            rows = moved if name.factor == "A" else moved.T
            width = rows[:, side].shape[1]
            rows[:, side] = 1.0 + 0.1 * (client_id == "b") + torch.eye(2)[:, :width]
            tree[name] = moved
    return Fitted(tree, 10)


def test_kin_are_heard_strangers_are_not_and_who_has_none_is_exactly_local_only():
    method = replace(METHOD, memory=0.0)
    watch = Watch(of_groups)
    states, _ = simulate(method, ["abc"] * 3, train=watch)
    rows = states["server"].rows
    assert rows.keys() == {"a", "b"}
    for one, other in ("ab", "ba"):
        theirs = select(states[f"clients/{other}"].individual, INDIVIDUAL)
        for site in SITES:
            expected = product(theirs, INDIVIDUAL, site)
            found = product(rows[one], REST_OF_WORLD, site)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    alone = Watch(of_groups)
    yardstick, _ = simulate(LocalOnly(lora=LORA), ["abc"] * 3, train=alone)
    for ours, theirs in zip(watch.orders["c"], alone.orders["c"], strict=True):
        assert ours.plan == theirs.plan
        assert ours.train == theirs.train
        assert trees.equal(ours.tree, theirs.tree)
    mine = served(method, states, "c", of_groups)["c"]
    local = served(LocalOnly(lora=LORA), yardstick, "c", of_groups)["c"]
    assert mine.plan == local.plan
    assert trees.equal(mine.tree, local.tree)


@pytest.mark.parametrize("alone", [1, 3])
def test_nobody_listens_in_the_first_rounds(alone):
    watch = Watch()
    simulate(replace(EVERYBODY, alone=alone), ["abc"] * 4, train=watch)
    for orders in watch.orders.values():
        heard = [len(order.plan.slots) == 2 for order in orders]
        assert heard == [at >= alone for at in range(4)]


def test_the_rest_of_world_is_frozen_and_stands_beside_an_adapter_of_full_strength():
    watch = Watch()
    states, _ = simulate(replace(EVERYBODY, gain=0.5), ["abc"] * 3, train=watch)
    order = watch.orders["a"][-1]
    assert order.plan.combine == Sum((1.0, 0.5))
    assert {name.slot for name in order.train} == {INDIVIDUAL, HEAD}
    row = select(order.tree, REST_OF_WORLD)
    assert trees.equal(states["clients/a"].row, row)
    for site in SITES:  # of the round before: the mean of the products of b and c, cut to rank 2
        uploads = [select(watch.orders[each][-1].tree, INDIVIDUAL) for each in "bc"]
        dense = sum(product(upload, INDIVIDUAL, site) for upload in uploads) / 2
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
        expected = u[:, :2] * s[:2] @ v[:2]
        found = product(row, REST_OF_WORLD, site)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_client_serves_the_pair_that_it_trained():
    states, _ = simulate(EVERYBODY, ["abc"] * 3)
    row, kept = states["server"].rows["a"], states["clients/a"].row
    assert not trees.equal(row, kept)  # the others have gone on
    serving = served(EVERYBODY, states, "a")["a"]
    assert trees.equal(select(serving.tree, REST_OF_WORLD), kept)
    shared = EVERYBODY.shared(states["clients/a"], Message(row))
    assert trees.equal(select(shared.tree, REST_OF_WORLD), kept)


def test_an_absent_client_is_still_heard_and_one_that_leaves_is_not():
    states, _ = simulate(EVERYBODY, ["abc", "abc", "ab"])
    server = states["server"]
    without_c, _ = simulate(EVERYBODY, ["ab"] * 3)
    left = EVERYBODY.without(server, "c")
    assert left.rows.keys() == left.similar.keys() == {"a", "b"}
    assert not trees.equal(server.rows["a"], left.rows["a"])
    b = states["clients/b"].individual
    for site in SITES:
        found, expected = product(left.rows["a"], REST_OF_WORLD, site), product(b, INDIVIDUAL, site)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "c" not in left.latest
    assert without_c["server"].rows.keys() == left.rows.keys()


def test_what_is_sent_is_an_adapter_up_and_one_down_or_nothing():
    _, costs = simulate(EVERYBODY, ["ab"] * 2)
    first, later = costs[0], costs[2]
    assert first.download_bytes < 600
    assert 0 < later.download_bytes - 4 * P < 4000
    assert 0 < later.upload_bytes - 4 * P < 4000


def test_adapters_that_nobody_has_trained_say_nothing():
    start = START.adapter(LORA.slot(INDIVIDUAL))
    server = EVERYBODY.aggregate(Server(latest=MemoryLedger()), [("a", Message(start))])
    assert server.similar == {}
    assert server.rows == {}


@pytest.mark.parametrize(
    "wrong",
    [{"tau": 1.0}, {"width": 0.0}, {"memory": 1.0}, {"power": -1.0}, {"alone": 0}, {"gain": -0.5}],
)
def test_impossible_settings_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}, but it "):
        FedALTSelect(**wrong)
