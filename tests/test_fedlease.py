"""The oracles of FedLEASE that need no model; those of the routed layer are in test_lowrank.py."""

import pytest
import torch
from federation import (
    START,
    MemoryStates,
    one_by_one,
    pull,
    run_groups,
    served,
    servings,
    simulate,
)
from runs_for_tests import save_model, scores_of, settings_for, write_clients

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import MIXER, ROUTER, Plan, Router, Shape, Slot, single
from fedalt.core import tree as trees
from fedalt.core.tree import Name, move, select
from fedalt.engine.states import client_of, server_of
from fedalt.methods.clustering import cluster, distances
from fedalt.methods.contract import Message
from fedalt.methods.fedlease import INDIVIDUAL, FedLEASE, Server
from fedalt.methods.lora import Lora
from fedalt.runs.folder import RunFolder
from fedalt.runs.lifecycle import start_run
from fedalt.runs.setup import prepare
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FedLEASE(lora=LORA, warm_up=1)
# The first letter of a client's name is its group.
SIX = ("x1", "x2", "y1", "y2", "z1", "z2")
Q = Name("block.0.q", "", "")


def grouped(client_id, number, order):
    """Pull nine parts towards the group's target and one part towards the client's own."""
    group, own = pull(client_id[0], number, order), pull(client_id, number, order)
    moved = {name: 0.9 * group.tree[name] + 0.1 * own.tree[name] for name in group.tree}
    return Fitted(moved, 20)


def uploads_of(states):
    latest = states["server"].latest
    return {each: latest[each].tree for each in latest.clients()}


def groups_of(states):
    """The clients of every group, in the groups' order."""
    clusters = states["server"].clusters
    return [
        "".join(sorted(each for each in clusters if clusters[each] == group))
        for group in range(len(set(clusters.values())))
    ]


# Distances and clusters


def random_pairs(count=4, rank=2):
    random = torch.Generator().manual_seed(0)
    shapes = single(LORA.slot(INDIVIDUAL)).shapes(START.sites)
    return {
        f"client {number}": {name: torch.randn(shapes[name], generator=random) for name in shapes}
        for number in range(count)
    }


@pytest.mark.parametrize("signal", ["B", "BA"])
def test_distances_are_the_mean_of_one_minus_cosine_over_sites(signal):
    pairs = random_pairs()

    def seen(tree, site):
        b = tree[Name(site, INDIVIDUAL, "B")].double()
        return b if signal == "B" else b @ tree[Name(site, INDIVIDUAL, "A")].double()

    found = distances(pairs, signal)
    for i, left in enumerate(pairs.values()):
        for j, right in enumerate(pairs.values()):
            cosines = [
                torch.cosine_similarity(seen(left, site).flatten(), seen(right, site).flatten(), 0)
                for site in START.sites
            ]
            assert float(found[i, j]) == pytest.approx(1 - float(sum(cosines)) / 2, abs=1e-6)
    assert not found.diagonal().any()


def test_products_are_compared_whatever_basis_they_are_written_in():
    pairs = random_pairs(2)
    turn = torch.tensor([[0.0, 2.0], [-0.5, 0.0]])
    other = {
        name: turn @ tensor if name.factor == "A" else tensor @ torch.linalg.inv(turn)
        for name, tensor in pairs["client 0"].items()
    }
    same = {"client 0": pairs["client 0"], "turned": other}
    assert float(distances(same, "BA")[0, 1]) == pytest.approx(0, abs=1e-6)
    assert float(distances(same, "B")[0, 1]) > 0.5


def test_a_zero_b_has_no_direction_and_is_an_error():
    pairs = random_pairs()
    pairs["client 2"][Name("block.1.q", INDIVIDUAL, "B")].zero_()
    with pytest.raises(ValueError, match=r"B of client 'client 2' is zero on block\.1\.q"):
        distances(pairs, "B")


def test_whose_b_is_zero_is_in_no_group_yet_and_goes_on_alone():
    pairs = random_pairs()
    pairs["client 2"][Name("block.1.q", INDIVIDUAL, "B")].zero_()
    uploads = [(each, Message(tree, {"weight": 1.0})) for each, tree in pairs.items()]
    after = METHOD.aggregate(METHOD.init_server(START), uploads)
    assert after.clusters.keys() == pairs.keys() - {"client 2"}
    assert METHOD.broadcast(after, "client 2").facts["own"] == -1


def test_the_silhouettes_of_four_blocks_are_those_computed_by_hand():
    block = torch.arange(16) // 4
    far = torch.where(block[:, None] == block, 0.1, 1.0).double().fill_diagonal_(0)
    # Of two clusters both may be two blocks, or one may be three: a hair's breadth decides for the
    # former, whose silhouette is 1 - (3 * 0.1 + 4 * 1) / 7.
    near = (block[:, None] // 2 == block // 2) & (block[:, None] != block)
    far -= 1e-7 * near
    found = cluster(far, 5)
    expected = {2: 27 / 70, 3: 0.642857, 4: 0.9, 5: 0.675}
    assert found.silhouettes == pytest.approx(expected, abs=1e-6)
    assert found.clusters == 4
    assert len({(int(block[i]), label) for i, label in enumerate(found.labels)}) == 4
    assert cluster(far, 3).clusters == 3
    assert cluster(far, 1).labels == (0,) * 16
    assert cluster(far, 8, 0.89).clusters == 4
    assert cluster(far, 8, 0.91).labels == (0,) * 16


def test_fewer_than_three_clients_are_one_cluster():
    assert cluster(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 8).labels == (0, 0)
    assert cluster(torch.zeros(1, 1), 8).labels == (0,)


def test_the_number_of_a_cluster_does_not_depend_on_the_order_of_the_clients():
    at = torch.tensor([0.0, 0.1, 5.0, 5.1, 5.3, 9.0, 9.1])
    far = (at[:, None] - at).abs()
    assert cluster(far, 5).labels == (2, 2, 0, 0, 0, 1, 1)  # the largest, then the more central
    for seed in range(5):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        permuted = cluster(far[order][:, order], 5).labels
        assert permuted == tuple(cluster(far, 5).labels[index] for index in order)


# The federation


def test_all_clients_begin_with_the_same_pair_router_and_head():
    for method in (METHOD, FedLEASE(lora=LORA, share_router=False)):
        one, other = (method.init_client(START, each) for each in ("x1", "z2"))
        for field in ("individual", "router", "head"):
            assert trees.equal(getattr(one, field), getattr(other, field))
    assert {tuple(tensor.shape) for tensor in one.router.values()} == {(15, 5)}


@pytest.mark.parametrize("signal", ["B", "BA"])
def test_clients_with_a_common_target_are_found_to_be_a_group(signal):
    method = FedLEASE(lora=LORA, warm_up=1, signal=signal)
    states, _ = simulate(method, [SIX], train=grouped)
    assert sorted(groups_of(states)) == ["x1x2", "y1y2", "z1z2"]


def test_an_expert_starts_as_the_mean_of_its_members_pairs():
    states, _ = simulate(METHOD, [SIX], train=grouped)
    uploads = uploads_of(states)
    for number, group in enumerate(groups_of(states)):
        expert = select(states["server"].experts, f"expert_{number}")
        assert len(expert) == 4
        for name, tensor in expert.items():
            each = [uploads[client][name._replace(slot=INDIVIDUAL)] for client in SIX]
            members = [pair for pair, client in zip(each, SIX, strict=True) if client in group]
            torch.testing.assert_close(tensor, sum(members) / 2, rtol=0, atol=1e-6)


def test_every_group_starts_with_the_router_of_the_runs_seed():
    states, _ = simulate(METHOD, [SIX], train=grouped)
    drawn = START.mixer(5)
    for number in range(3):
        router = move(states["server"].routers, f"router_{number}", MIXER)
        assert trees.equal(router, drawn)


def test_afterwards_the_mean_of_a_group_is_that_of_its_members_in_the_round():
    states, _ = simulate(METHOD, [SIX], train=grouped)
    trained = {}

    def watch(client_id, number, order):
        fitted = grouped(client_id, number, order)
        trained[client_id] = fitted.tree
        return fitted

    before = states["server"]
    simulate(METHOD, [("x1", "x2", "y2")], states, watch)
    own = {group[0]: number for number, group in enumerate(groups_of(states))}
    after = states["server"]
    for name in select(before.experts, f"expert_{own['x']}"):
        mean = (trained["x1"][name] + trained["x2"][name]) / 2
        torch.testing.assert_close(after.experts[name], mean, rtol=0, atol=1e-6)
    for name in select(before.experts, f"expert_{own['y']}"):
        assert torch.equal(after.experts[name], trained["y2"][name])
    g = Q._replace(factor="G")
    mean = (trained["x1"][g._replace(slot=ROUTER)] + trained["x2"][g._replace(slot=ROUTER)]) / 2
    found = after.routers[g._replace(slot=f"router_{own['x']}")]
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share_router", [True, False])
def test_absent_groups_and_the_experts_of_others_stay_as_they_are(share_router):
    method = FedLEASE(lora=LORA, warm_up=1, share_router=share_router)
    states, _ = simulate(method, [SIX], train=grouped)
    before = states["server"]
    orders = {}

    def watch(client_id, number, order):
        orders[client_id] = order
        return grouped(client_id, number, order)

    simulate(method, [("x1", "y1")], states, watch)
    own = {group[0]: number for number, group in enumerate(groups_of(states))}
    absent = (f"expert_{own['z']}", f"router_{own['z']}")
    for then, now in (
        (before.experts, states["server"].experts),
        (before.routers, states["server"].routers),
    ):
        assert trees.equal(select(then, *absent), select(now, *absent))
    assert not trees.equal(before.experts, states["server"].experts)
    for client_id, order in orders.items():
        slots = {name.slot for name in order.train}
        assert slots == {f"expert_{own[client_id[0]]}", ROUTER, "head"}
        assert order.plan.combine == Router(own[client_id[0]], "paper", True)
        experts = select(order.tree, "expert_0", "expert_1", "expert_2")
        assert trees.equal(experts, before.experts)


def test_only_the_end_of_the_warm_up_is_uploaded():
    method = FedLEASE(lora=LORA, warm_up=3)
    states, costs = simulate(method, [SIX] * 2, train=grouped)
    assert {cost.upload_bytes for cost in costs} == {0}
    serving, shared = servings(method, START, states, "x1", pull)
    assert shared is None
    alone = client_of(method, START, states, "x1").individual
    assert trees.equal(select(serving.tree, INDIVIDUAL), alone)
    _, costs = simulate(method, [SIX], states, grouped)
    assert all(cost.upload_bytes > 0 for cost in costs)
    assert len(states["server"].experts) == 3 * 4


def test_a_warm_up_whose_end_nobody_took_part_in_goes_on():
    method = FedLEASE(lora=LORA, warm_up=2)
    states, _ = simulate(method, [SIX, ()], train=grouped)
    assert not states["server"].clusters
    simulate(method, [SIX], states, grouped)
    assert len(groups_of(states)) == 3


@pytest.mark.parametrize("late", ["y3", "z3"])
def test_who_missed_the_warm_up_trains_one_round_alone_and_joins_the_nearest_group(late):
    states, _ = simulate(METHOD, [SIX], train=grouped)
    before = states["server"]
    orders = []

    def watch(client_id, number, order):
        orders.append(order)
        return grouped(client_id, number, order)

    assert set(served(METHOD, states, [late])[late].plan.slots) == {LORA.slot(INDIVIDUAL)}
    simulate(METHOD, [(late,)], states, watch)
    after = states["server"]
    assert trees.equal(before.experts, after.experts)  # the pair only shows where it belongs
    assert after.clusters[late] == before.clusters[f"{late[0]}1"]
    assert after.latest.clients() == sorted([*SIX, late])
    simulate(METHOD, [(late,)], states, watch)
    assert [order.plan.slots[0].name for order in orders] == [INDIVIDUAL, "expert_0"]
    assert not trees.equal(before.experts, states["server"].experts)
    assert states["server"].clusters == after.clusters


def test_private_routers_stay_with_their_clients():
    method = FedLEASE(lora=LORA, warm_up=1, share_router=False)
    states, _ = simulate(method, [SIX] * 3, train=grouped)
    assert not states["server"].routers
    serving, shared = servings(method, START, states, "x1", pull)
    router = states["clients/x1"].router
    assert trees.equal(select(serving.tree, ROUTER), router)
    assert {tuple(tensor.shape) for tensor in router.values()} == {(5, 5)}
    assert not trees.equal(router, states["clients/x2"].router)
    own = states["server"].clusters["x1"]
    assert shared.plan == single(LORA.slot(f"expert_{own}"))
    fresh = servings(method, START, simulate(method, [SIX], train=grouped)[0], "x1", pull)[0]
    assert trees.equal(move(fresh.tree, ROUTER, MIXER), START.mixer(5))


def test_a_group_with_a_shared_router_is_served_alike():
    states, _ = simulate(METHOD, [SIX] * 2, train=grouped)
    for client_id in ("x1", "x2"):
        own, shared = servings(METHOD, START, states, client_id, pull)
        assert shared.plan == own.plan
        assert trees.equal(shared.tree, own.tree)
    first, second = served(METHOD, states, ["x1", "x2"]).values()
    everything = {name.slot for name in first.tree} - {"head"}
    assert trees.equal(select(first.tree, *everything), select(second.tree, *everything))


@pytest.mark.parametrize("settings", [{"max_experts": 1}, {"min_silhouette": 0.999}, {}])
def test_one_expert_is_plain_lora_without_a_router(settings):
    clients = SIX if settings else SIX[:2]
    method = FedLEASE(lora=LORA, warm_up=1, **settings)
    states, _ = simulate(method, [clients] * 2, train=grouped)
    assert not states["server"].routers
    for serving in served(method, states, clients).values():
        assert serving.plan == single(LORA.slot("expert_0"))
        assert {name.slot for name in serving.tree} == {"expert_0", "head"}


def test_weights_by_examples_count_in_the_first_mean_and_in_later_ones():
    method = FedLEASE(lora=LORA, warm_up=1, max_experts=1, weighting="examples")
    states, _ = simulate(method, [("a", "b")])  # of 10 and of 30 examples
    pairs = uploads_of(states)
    b = Q._replace(factor="B")
    expected = (
        pairs["a"][b._replace(slot=INDIVIDUAL)] + 3 * pairs["b"][b._replace(slot=INDIVIDUAL)]
    ) / 4
    found = states["server"].experts[b._replace(slot="expert_0")]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    trained = {}

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        trained[client_id] = fitted.tree[b._replace(slot="expert_0")]
        return fitted

    simulate(method, [("a", "b")], states, watch)
    found = states["server"].experts[b._replace(slot="expert_0")]
    torch.testing.assert_close(found, (trained["a"] + 3 * trained["b"]) / 4, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": 0}, "warm_up=0, but it is at least 1"),
        ({"max_experts": 0}, "max_experts=0, but it is at least 1"),
        ({"min_silhouette": 1.5}, "min_silhouette=1.5, but it lies between -1 and 1"),
    ],
)
def test_settings_without_sense_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        FedLEASE(**settings)


# Bytes


def test_the_closed_forms_of_the_bytes_at_the_papers_size():
    """RoBERTa-large, query and value, rank 4, four experts."""
    sites = {f"{layer}.{kind}": Shape(1024, 1024) for layer in range(24) for kind in "qv"}
    slots = tuple(Slot(f"expert_{number}", 4, 16) for number in range(4))
    needed = Plan(slots, Router(0, "paper", True)).shapes(sites)

    def numbers(*wanted):
        return sum(torch.Size(needed[name]).numel() for name in needed if name.slot in wanted)

    assert numbers("expert_0") == 393_216
    assert numbers("expert_0", ROUTER) == 737_280
    assert numbers(*(slot.name for slot in slots), ROUTER) == 1_916_928


@pytest.mark.parametrize("share_router", [True, False])
def test_message_bytes_equal_the_closed_forms(share_router):
    d, l, n, r, m = 300, 200, 2, LORA.rank, 3  # noqa: E741 - the letters of the closed forms
    init = Initializer({f"site.{number}": Shape(d, l) for number in range(n)}, {}, seed=7)
    method = FedLEASE(lora=LORA, warm_up=1, share_router=share_router)
    states, costs = MemoryStates(), []
    for _ in range(2):
        run_groups(method, init, states, [sorted(SIX)], one_by_one(grouped))
    router = (2 * m - 1) * d if share_router else 0
    assert len(groups_of(states)) == m
    for cost in costs[:6]:  # the warm-up: one pair up, nothing but facts down
        assert 0 < cost.upload_bytes - 4 * n * r * (d + l) < 1500
        assert cost.download_bytes < 600
    for cost in costs[6:]:
        assert 0 < cost.upload_bytes - 4 * n * (r * (d + l) + router) < 1500
        assert 0 < cost.download_bytes - 4 * n * (m * r * (d + l) + router) < 3000


# On a model


def test_a_real_run_groups_its_clients_and_lets_one_in_that_came_late(tmp_path):
    model = save_model(tmp_path / "model")
    data = write_clients(tmp_path / "data", ("a", "b", "c", "d"), count=8)
    method = {"name": "fedlease", "warm_up": 1}
    rounds = {"rounds": 4, "participation": 0.75, "select": "last"}
    prepared = prepare(settings_for(model, data, method=method, rounds=rounds))
    run = tmp_path / "run"
    start_run(prepared, run)
    lines = scores_of(run)
    trained = [line for line in lines if line["kind"] == "train" and line["column"] == "own"]
    sent = {(line["round"], line["client"]): line["upload_bytes"] for line in trained}
    losses = {(line["round"], line["client"]): line["metrics"]["loss"] for line in trained}
    assert {client for at, client in sent if at < 2} == {"a", "c", "d"}
    assert {client for at, client in sent if at == 2} == {"b", "c", "d"}
    assert sent[2, "b"] < sent[2, "c"]  # its pair, and no router yet
    assert sent[3, "b"] == sent[2, "c"]

    method, init = prepared.parts.settings.method, prepared.parts.init
    server: Server = server_of(method, init, RunFolder(run).states("own", 4))
    assert server.clusters.keys() == set("abcd")
    assert list(server.latest.clients()) == list("abcd")
    assert len(set(server.clusters.values())) == 2  # of the first three clients, the most
    tested = {
        (line["client"], line["column"]): line["metrics"]["loss"]
        for line in lines
        if line["kind"] == "score" and line["split"] == "test"
    }
    for client in "abcd":
        assert tested[client, "shared"] == tested[client, "own"]
    assert losses[3, "c"] < losses[2, "c"] < losses[1, "c"] < losses[0, "c"]
    assert losses[3, "d"] < losses[2, "d"] < losses[1, "d"] < losses[0, "d"]
