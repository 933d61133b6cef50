"""FSLoRA: what a sketch is, what a client trains of it, and where its changes go."""

from itertools import combinations

import pytest
import torch
from federation import SITES, START, MemoryStates, pull, served, simulate

from fedalt.core import tree as trees
from fedalt.core.seeds import seed_of
from fedalt.core.tree import Name
from fedalt.methods.contract import Message
from fedalt.methods.fedit import FedIT
from fedalt.methods.fslora import SHARED, FSLoRA, Server, sketch
from fedalt.methods.lora import Lora
from fedalt.methods.rank_rows import put, taken

LORA = Lora(rank=2, alpha=8, dropout=0.0)
METHOD = FSLoRA(lora=LORA, ranks={"a": 1, "b": 3}, whole_rank=4)
A, B = Name("block.0.q", SHARED, "A"), Name("block.0.q", SHARED, "B")


def rows_at(seed, number, whole, rank, name=A):
    """The sketch of one site."""
    return sketch(seed, number, [name], whole, rank)[name.site]


def test_rows_are_taken_and_put_back_where_they_were():
    whole = {A: torch.tensor([[1.0], [2.0], [3.0]]), B: torch.tensor([[4.0, 5.0, 6.0]])}
    part = taken(whole, {A.site: [0, 2]})
    assert part[A].tolist() == [[1.0], [3.0]]
    assert part[B].tolist() == [[4.0, 6.0]]
    back = put(part, {A.site: [0, 2]}, 3)
    assert back[A].tolist() == [[1.0], [0.0], [3.0]]
    assert back[B].tolist() == [[4.0, 0.0, 6.0]]


def test_a_sketch_has_as_many_rows_as_asked_and_every_subset_is_as_likely():
    counts = dict.fromkeys(combinations(range(4), 2), 0)
    for number in range(1200):
        counts[tuple(rows_at(5, number, 4, 2))] += 1
    assert all(150 < count < 250 for count in counts.values()), counts  # 200 each
    assert rows_at(5, 0, 4, 4) == [0, 1, 2, 3]


def test_the_mean_of_a_sketch_matrix_over_all_subsets_is_one():
    subsets = list(combinations(range(5), 2))
    total = torch.zeros(5)
    for rows in subsets:
        total[list(rows)] += 5 / 2
    assert torch.equal(total / len(subsets), torch.ones(5))


def watched(method, cohorts, states=None):
    fits = []

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        fits.append((client_id, order, fitted.tree))
        return fitted

    states, costs = simulate(method, cohorts, states, train=watch)
    return states, fits, costs


def test_a_client_trains_its_rows_of_both_factors_with_their_scaling():
    states, _ = simulate(METHOD, [("a", "b", "c")])
    whole = states["server"].adapter
    _, fits, _ = watched(METHOD, [("a", "b", "c")], states)
    for client, order, _ in fits:
        rank = {"a": 1, "b": 3, "c": 2}[client]
        rows = rows_at(seed_of(START.seed, client), 1, 4, rank)
        (slot,) = order.plan.slots
        assert (slot.rank, slot.scaling) == (rank, 8 / 4 * 4 / rank)  # s R / r_k
        assert torch.equal(order.tree[A], whole[A][rows])
        assert torch.equal(order.tree[B], whole[B][:, rows])


def test_sketches_differ_from_round_to_round_and_client_to_client():
    rounds = {tuple(rows_at(seed_of(7, "a"), number, 16, 4)) for number in range(8)}
    clients = {tuple(rows_at(seed_of(7, client), 0, 16, 4)) for client in "abcdefgh"}
    assert len(rounds) == len(clients) == 8


def test_every_site_has_a_choice_of_its_own_and_its_two_factors_share_it():
    sites = [f"block.{number}.q" for number in range(8)]
    names = [Name(site, SHARED, factor) for site in sites for factor in "AB"]
    found = sketch(7, 0, names, 16, 4)
    assert len({tuple(found[site]) for site in sites}) == 8
    assert found[sites[3]] == rows_at(7, 0, 16, 4, names[6])  # whatever other sites there are

    method = FSLoRA(lora=LORA, whole_rank=64)
    _, fits, _ = watched(method, [("a",)])
    whole = method.init_server(START).adapter
    trained = {
        name.site: [whole[name].tolist().index(row) for row in tensor.tolist()]
        for name, tensor in fits[0][1].tree.items()
        if name.factor == "A"
    }
    assert trained == sketch(seed_of(START.seed, "a"), 0, whole, 64, LORA.rank)
    assert len({tuple(rows) for rows in trained.values()}) == len(SITES)


def test_changes_are_divided_by_all_who_took_part_not_by_a_rows_owners():
    uploads = {
        "a": {A: torch.ones(1, 5), B: torch.ones(4, 1)},
        "b": {A: torch.ones(3, 5), B: torch.ones(4, 3)},
    }
    start = Server({A: torch.full((4, 5), 2.0), B: torch.zeros(4, 4)}, START.seed)
    replies = [(k, Message(tree, {"weight": 1.0, "round": 0})) for k, tree in uploads.items()]
    after = METHOD.aggregate(start, replies)
    trained = [rows_at(seed_of(START.seed, k), 0, 4, r) for k, r in (("a", 1), ("b", 3))]
    for row in range(4):
        moved = sum(row in rows for rows in trained) / 2
        assert after.adapter[A][row].tolist() == [2 + moved] * 5
        assert after.adapter[B][:, row].tolist() == [moved] * 4
    assert after.rounds == 1


def test_a_late_upload_goes_where_its_own_round_had_taken_it_from():
    upload = {A: torch.ones(1, 5), B: torch.ones(4, 1)}
    start = Server({A: torch.zeros(4, 5), B: torch.zeros(4, 4)}, START.seed, rounds=9)
    places = set()
    for number in range(9):
        message = Message(upload, {"weight": 1.0, "round": number})
        after = METHOD.aggregate(start, [("a", message)]).adapter
        (row,) = after[A].any(1).nonzero().flatten().tolist()
        assert [row] == rows_at(seed_of(START.seed, "a"), number, 4, 1)
        places.add(row)
    assert len(places) > 1


def test_rows_outside_every_sketch_stay_bit_for_bit():
    states, _ = simulate(METHOD, [("a", "b", "c")])
    before = states["server"].adapter
    simulate(METHOD, [("a",)], states)
    for name, tensor in states["server"].adapter.items():
        (row,) = rows_at(seed_of(START.seed, "a"), 1, 4, 1, name)
        now, old = (each if name.factor == "A" else each.T for each in (tensor, before[name]))
        for at in range(4):
            assert torch.equal(now[at], old[at]) == (at != row)


def test_sketched_whole_it_is_fedit():
    cohorts = [("a", "b", "c"), ("a", "c"), ("b",)]
    ours, _ = simulate(FSLoRA(lora=LORA, whole_rank=2, weighting="examples"), cohorts)
    fedit, _ = simulate(FedIT(lora=LORA, weighting="examples"), cohorts)
    for name, tensor in fedit["server"].adapter.items():
        torch.testing.assert_close(ours["server"].adapter[name], tensor)


def test_everybody_serves_the_whole_adapter():
    states, _ = simulate(METHOD, [("a", "b")])
    for serving in served(METHOD, states, "abc").values():
        (slot,) = serving.plan.slots
        assert (slot.rank, slot.scaling) == (4, 2)
        assert trees.equal(trees.select(serving.tree, SHARED), states["server"].adapter)
    assert served(METHOD, MemoryStates(), ["a"])["a"].plan.slots[0].rank == 4


def test_bytes_are_a_clients_rank_up_and_the_whole_down():
    _, costs = simulate(METHOD, [("a", "b", "c")])
    size = sum(d_in + d_out for d_in, d_out in SITES.values())
    for cost, rank in zip(costs, (1, 3, 2), strict=True):
        assert 0 < cost.upload_bytes - 4 * rank * size < 4000
        assert 0 < cost.download_bytes - 4 * 4 * size < 4000


def test_the_whole_has_twice_the_largest_rank_unless_it_is_given():
    assert FSLoRA(lora=LORA, ranks={"b": 3}).init_server(START).adapter[A].shape == (6, 5)
    for wrong in (2, 0):
        with pytest.raises(ValueError, match=f"whole_rank={wrong}"):
            FSLoRA(lora=LORA, ranks={"b": 3}, whole_rank=wrong)
