"""The oracles of FedALT-select: who is heard and how much, exact sums, and when silence is kept."""

from dataclasses import replace

import pytest
import torch
from federation import SITES, pull, served, simulate

from fedalt.adapters.plan import HEAD, Sum
from fedalt.core import tree as trees
from fedalt.core.tree import Name, select
from fedalt.methods.contract import Message
from fedalt.methods.fedalt_select import (
    INDIVIDUAL,
    REST_OF_WORLD,
    FedALTSelect,
    Server,
)
from fedalt.methods.kin import closeness, mean_of_factors, similarities
from fedalt.methods.kin_sums import sums_of_products
from fedalt.methods.local import LocalOnly
from fedalt.methods.lora import Lora
from fedalt.runs.checkpoints import FileLedger
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FedALTSelect(lora=LORA)
EVERYBODY = FedALTSelect(lora=LORA, tau=-1.0, width=1e-9, gap=2.0)  # all count as much as oneself
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
    """Carries orders out as told and keeps them, and what came of them, by client."""

    def __init__(self, carry_out=pull):
        self.orders, self.ends, self.carry_out = {}, {}, carry_out

    def __call__(self, client_id, number, order):
        fitted = self.carry_out(client_id, number, order)
        self.orders.setdefault(client_id, []).append(order)
        self.ends.setdefault(client_id, []).append(fitted.tree)
        return fitted


def test_similarity_is_the_cosine_of_products_and_not_of_factors():
    # (1, 0) (2, 0) and (2, 0) (1, 0) are one product; (1, 1) (1, 0) is at 45 degrees to it.
    adapters = {
        "a": pair([[1.0], [0.0]], [[2.0, 0.0]]),
        "b": pair([[2.0], [0.0]], [[1.0, 0.0]]),
        "c": pair([[1.0], [1.0]], [[1.0, 0.0]]),
        "d": pair([[-3.0], [0.0]], [[1.0, 0.0]]),
    }
    found = similarities(adapters)
    assert found["a"] == pytest.approx({"b": 1.0, "c": 0.5**0.5, "d": -1.0})
    assert found["c"] == pytest.approx({"a": 0.5**0.5, "b": 0.5**0.5, "d": -(0.5**0.5)})


def test_similarity_is_a_mean_over_sites_and_what_nobody_has_trained_has_none():
    here, there = (pair([[1.0], [0.0]], [[1.0, 0.0]], site=site) for site in "st")
    across = pair([[0.0], [1.0]], [[1.0, 0.0]], site="t")
    untrained = pair([[0.0], [0.0]], [[1.0, 0.0]], site="t")
    adapters = {"a": here | there, "b": here | across, "new": here | untrained}
    assert similarities(adapters) == {"a": {"b": 0.5}, "b": {"a": 0.5}}


@pytest.mark.parametrize(
    ("similar", "expected"),
    [
        ({"b": 0.4, "c": 0.3, "d": 0.1}, {"b": 1.0, "c": 0.5}),
        ({"b": 0.9, "c": 0.25}, {"b": 1.0, "c": 0.25}),  # nobody counts more than the client itself
        ({"b": 0.2, "c": -0.5}, {}),
        ({}, {}),
    ],
)
def test_closeness_by_hand(similar, expected):
    assert closeness(similar, tau=0.2, width=0.2, gap=2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("similar", "kin"),
    [
        ({"c": 0.5, "a": 0.9, "b": 0.8, "d": 0.45}, "ab"),  # 0.5 does the same form, not the task
        ({"a": 0.9, "b": 0.72, "c": 0.55, "d": 0.4}, "abcd"),  # no gap is large
        ({"a": 0.5, "b": 0.45, "c": 0.2}, "ab"),  # tau ends it before any gap
        ({"a": 0.25}, ""),
    ],
)
def test_kin_end_before_the_first_large_gap(similar, kin):
    near = closeness(similar, tau=0.3, width=0.3, gap=0.2)
    assert sorted(near) == sorted(kin)
    assert list(near) == [other for other in similar if other in near]
    whole = closeness(similar, tau=0.3, width=0.3, gap=2.0)
    assert near == {other: whole[other] for other in near}


def test_the_sum_of_products_is_exact_as_long_as_the_rank_holds_it():
    adapters = {
        "a": pair([[1.0], [0.0], [2.0]], [[1.0, 0.0, 1.0, 0.0]]),
        "b": pair([[0.0], [3.0], [1.0]], [[0.0, 2.0, 0.0, 1.0]]),
    }
    weights = {"a": 0.25, "b": 0.75}
    dense = sum(w * product(adapters[each], INDIVIDUAL, "s") for each, w in weights.items())
    for rank in (2, 3):
        found = sums_of_products(adapters, {"a": weights}, REST_OF_WORLD, rank)["a"]
        assert found[Name("s", REST_OF_WORLD, "A")].shape == (rank, 4)
        torch.testing.assert_close(product(found, REST_OF_WORLD, "s"), dense, rtol=0, atol=1e-6)
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    cut = sums_of_products(adapters, {"a": weights}, REST_OF_WORLD, 1)["a"]
    cut = product(cut, REST_OF_WORLD, "s")
    torch.testing.assert_close(cut, s[0] * u[:, :1] @ v[:1], rtol=0, atol=1e-6)


def test_clients_that_are_done_together_are_sent_what_each_would_be_alone():
    stream = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 40, generator=stream)
    adapters = {}
    for client in "abcde":  # all A close to the drawn one, as where training has just begun
        a = drawn + 1e-3 * torch.randn(3, 40, generator=stream)
        adapters[client] = {
            Name("s", INDIVIDUAL, "A"): a,
            Name("s", INDIVIDUAL, "B"): torch.randn(30, 3, generator=stream),
        }
    kin = {
        "a": {"a": 0.5, "b": 0.3, "c": 0.2},
        "b": {"a": 0.2, "b": 0.6, "c": 0.2},
        "c": {"c": 0.2, "b": 0.3, "a": 0.5},  # the same weights as a
        "d": {"d": 0.5, "e": 0.5},
        "e": {"e": 0.7, "d": 0.2, "a": 0.1},  # kin that do not hear it
    }
    together = sums_of_products(adapters, kin, REST_OF_WORLD, 3)
    assert list(together) == list(kin)
    for client, weights in kin.items():
        dense = sum(w * product(adapters[k], INDIVIDUAL, "s") for k, w in weights.items())
        u, s, v = torch.linalg.svd(dense)
        cut = (u[:, :3] * s[:3]) @ v[:3]
        found = product(together[client], REST_OF_WORLD, "s")
        torch.testing.assert_close(found, cut, rtol=0, atol=1e-6 * float(s[0]))
        alone = sums_of_products(adapters, {client: weights}, REST_OF_WORLD, 3)[client]
        for name, tensor in alone.items():
            torch.testing.assert_close(together[client][name], tensor)
            assert together[client][name].is_contiguous()


def test_similarities_of_many_clients_are_those_of_each_two():
    stream = torch.Generator().manual_seed(0)
    adapters = {
        f"{number:03}": pair(
            torch.randn(3, 2, generator=stream).tolist(),
            torch.randn(2, 4, generator=stream).tolist(),
        )
        for number in range(150)  # 300 rows: more than are computed at a time
    }
    found = similarities(adapters)
    for one, other in (("000", "001"), ("003", "149"), ("070", "069"), ("140", "080")):
        x, y = (product(adapters[client], INDIVIDUAL, "s").flatten() for client in (one, other))
        assert found[one][other] == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-6)
        assert found[one][other] == found[other][one]


@pytest.mark.parametrize("large", [1e-30, 1e30])
def test_similarity_does_not_depend_on_how_large_an_adapter_is(large):
    stream = torch.Generator().manual_seed(0)
    factors = [torch.randn(2, 2, generator=stream) for _ in range(4)]

    def found(times: float) -> float:
        one = pair((times * factors[0]).tolist(), (times * factors[1]).tolist())
        other = pair(factors[2].tolist(), factors[3].tolist())
        return similarities({"one": one, "other": other})["one"]["other"]

    assert found(large) == pytest.approx(found(1.0), abs=1e-6)


def test_the_mean_of_factors_is_another_matrix_than_that_of_products():
    adapters = {"a": pair([[2.0]], [[1.0]]), "b": pair([[4.0]], [[3.0]])}
    found = mean_of_factors(adapters, {"a": 0.25, "b": 0.25}, REST_OF_WORLD)
    assert product(found, REST_OF_WORLD, "s").item() == 0.5 * 3 * 2  # not 0.25 (2 + 12)
    weights = {"a": 0.25, "b": 0.25}
    found = sums_of_products(adapters, {"a": weights}, REST_OF_WORLD, 1)["a"]
    assert product(found, REST_OF_WORLD, "s").item() == pytest.approx(0.25 * (2 + 12))


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


def test_kin_share_a_start_and_who_has_none_is_exactly_local_only():
    watch = Watch(of_groups)
    states, _ = simulate(METHOD, ["abc"] * 4, train=watch)
    sent = states["server"].sent
    assert sent.keys() == {"a", "b"}
    for site in SITES:  # a and b are nearly the same, so both start in the middle
        middle = sum(product(states[f"clients/{k}"].individual, INDIVIDUAL, site) for k in "ab") / 2
        u, s, v = torch.linalg.svd(middle, full_matrices=False)
        for one in "ab":
            found = product(sent[one], INDIVIDUAL, site)
            torch.testing.assert_close(found, u[:, :2] * s[:2] @ v[:2], rtol=1e-5, atol=1e-6)
    alone = Watch(of_groups)
    baseline, _ = simulate(LocalOnly(lora=LORA), ["abc"] * 4, train=alone)
    for ours, theirs in zip(watch.orders["c"], alone.orders["c"], strict=True):
        assert ours.plan == theirs.plan
        assert ours.train == theirs.train
        assert trees.equal(ours.tree, theirs.tree)
    mine = served(METHOD, states, "c", of_groups)["c"]
    local = served(LocalOnly(lora=LORA), baseline, "c", of_groups)["c"]
    assert mine.plan == local.plan
    assert trees.equal(mine.tree, local.tree)


def test_the_less_alike_the_less_is_shared():
    b = 0.75  # cosine with (1, 0) is 0.8
    adapters = {"a": pair([[1.0], [0.0]], [[1.0]]), "b": pair([[1.0], [b]], [[1.0]])}
    method = FedALTSelect(lora=Lora(rank=1), tau=0.4, width=0.8, gap=2.0, alone=1)
    server = method.aggregate(Server(), [(k, Message(tree)) for k, tree in adapters.items()])
    found = product(server.sent["a"], INDIVIDUAL, "s")  # closeness 1/2: two thirds own, a third b
    torch.testing.assert_close(found, torch.tensor([[1.0], [b / 3]]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alone", [1, 3])
def test_nobody_listens_in_the_first_rounds(alone):
    watch = Watch()
    simulate(replace(EVERYBODY, alone=alone), ["abc"] * 5, train=watch)
    for client, orders in watch.orders.items():
        begun, before = (order.tree for order in orders[1:]), watch.ends[client]
        goes_on = [trees.equal(*pair) for pair in zip(begun, before, strict=False)]
        assert goes_on == [at < alone for at in range(1, 5)]


def test_a_newcomer_is_alone_for_as_long_before_it_listens_and_is_heard():
    states, _ = simulate(EVERYBODY, ["ab", "ab", "abn"])
    assert states["server"].sent.keys() == {"a", "b"}
    without_n, _ = simulate(EVERYBODY, ["ab", "ab", "ab"])
    assert trees.equal(states["server"].sent["a"], without_n["server"].sent["a"])
    states, _ = simulate(EVERYBODY, ["abn"], states)
    assert states["server"].sent.keys() == {"a", "b", "n"}


def test_a_client_serves_what_it_trained_and_not_its_next_start():
    states, _ = simulate(EVERYBODY, ["abc"] * 3)
    trained = states["clients/a"].individual
    serving = served(EVERYBODY, states, "a")["a"]
    assert trees.equal(select(serving.tree, INDIVIDUAL), trained)
    next_start = EVERYBODY.broadcast(states["server"], "a")
    assert not trees.equal(next_start.tree, trained)
    shared = EVERYBODY.shared(states["clients/a"], next_start)
    assert trees.equal(select(shared.tree, INDIVIDUAL), next_start.tree)


def test_a_rest_of_world_beside_the_adapter_is_frozen_and_as_strong_as_the_closest_of_kin():
    near = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [0.6, 0.8]}  # cosines with a: 0.8 and 0.6
    uploads = [(k, Message(pair([[x], [y]], [[1.0]]))) for k, (x, y) in near.items()]
    method = FedALTSelect(lora=Lora(rank=2), tau=0.5, width=0.6, gap=2.0, alone=1, beside=True)
    message = method.broadcast(method.aggregate(Server(), uploads), "a")
    # closeness 1/2 and 1/6: in all 1/2, of which three quarters b and one quarter c
    expected = torch.tensor([[0.75 * 0.8 + 0.25 * 0.6], [0.75 * 0.6 + 0.25 * 0.8]]).double() / 2
    found = product(message.tree, REST_OF_WORLD, "s")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    watch = Watch()
    states, _ = simulate(replace(EVERYBODY, beside=True), ["abc"] * 4, train=watch)
    order = watch.orders["a"][-1]
    assert order.plan.combine == Sum((1.0, 1.0))
    assert {name.slot for name in order.train} == {INDIVIDUAL, HEAD}
    assert trees.equal(states["clients/a"].row, select(order.tree, REST_OF_WORLD))


def test_a_sum_of_few_directions_leaves_no_dead_rows():
    def of_one_direction(client_id, number, order):
        """B has one column, so that all sums have one direction; A is what it was."""
        tree = dict(order.tree)
        for name in order.train:
            if name.factor == "B" and name.slot == INDIVIDUAL:
                tree[name] = torch.ones_like(tree[name]) * torch.tensor([1.0, 0.0])
        return Fitted(tree, 10)

    watch = Watch(of_one_direction)
    simulate(EVERYBODY, ["ab"] * 3, train=watch)
    begun, before = watch.orders["a"][2].tree, watch.ends["a"][1]
    for site in SITES:
        a, b = (Name(site, INDIVIDUAL, factor) for factor in "AB")
        assert not begun[b][:, 1].any()
        assert torch.equal(begun[a][1], before[a][1])
        dense = product(before, INDIVIDUAL, site)  # that of b is the same
        torch.testing.assert_close(product(begun, INDIVIDUAL, site), dense)


def test_an_absent_client_is_still_heard():
    states, _ = simulate(EVERYBODY, ["abc", "abc", "ab"])
    uploads = [states[f"clients/{each}"].individual for each in "abc"]
    for site in SITES:
        dense = sum(product(upload, INDIVIDUAL, site) for upload in uploads) / 3
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
        found = product(states["server"].sent["c"], INDIVIDUAL, site)
        torch.testing.assert_close(found, u[:, :2] * s[:2] @ v[:2], rtol=1e-5, atol=1e-5)


def test_who_has_left_is_heard_no_more_but_stays_in_what_others_made_of_it():
    states, _ = simulate(EVERYBODY, ["abc", "abc"])
    after = EVERYBODY.without(states["server"], "c")
    expected, _ = simulate(EVERYBODY, ["ab", "ab"])  # alone so far: a and b have trained the same
    assert (after.latest.clients(), after.uploads) == (["a", "b"], {"a": 2, "b": 2})
    assert after.sent.keys() == {"a", "b"}
    assert all(trees.equal(after.sent[who], expected["server"].sent[who]) for who in "ab")
    again = EVERYBODY.without(after, "c")
    assert all(trees.equal(again.sent[who], after.sent[who]) for who in "ab")
    assert EVERYBODY.mingled  # no `fedalt leave`: it is in what a and b have trained on


def test_this_rounds_uploads_are_summed_up_from_a_ledger_on_disk_too(tmp_path):
    on_disk = in_memory = Server()
    for round_ in range(3):
        uploads = [
            (each, Message(pair([[1.0 + round_], [float(at)]], [[1.0, 2.0]])))
            for at, each in enumerate("ab")
        ]
        on_disk = replace(on_disk, latest=FileLedger(tmp_path, round_))
        on_disk, in_memory = (EVERYBODY.aggregate(s, uploads) for s in (on_disk, in_memory))
    assert trees.equal(on_disk.sent["a"], in_memory.sent["a"])
    on_disk = EVERYBODY.aggregate(replace(on_disk, latest=FileLedger(tmp_path, 3)), uploads[:1])
    assert trees.equal(on_disk.sent["a"], in_memory.sent["a"])  # b is heard from the disk


def test_what_is_sent_is_an_adapter_up_and_one_down_or_nothing():
    _, costs = simulate(EVERYBODY, ["ab"] * 3)
    first, later = costs[0], costs[4]
    assert first.download_bytes == 0
    assert 0 < later.download_bytes - 4 * P < 4000
    assert 0 < later.upload_bytes - 4 * P < 4000


@pytest.mark.parametrize("wrong", [{"tau": 1.0}, {"width": 0.0}, {"alone": 0}, {"gap": 0.0}])
def test_impossible_settings_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}, but it "):
        FedALTSelect(**wrong)
