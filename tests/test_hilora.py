"""The oracles of HiLoRA: subspaces and clusters by hand, stages, what is frozen, the penalty."""

from dataclasses import replace

import pytest
import torch
from bases import base_of, example, start_of, train
from federation import SITES, START, pull, run_one, served, simulate

from fedalt.adapters.plan import HEAD, Sum
from fedalt.core import tree as trees
from fedalt.core.tree import Name, move, select
from fedalt.methods.contract import Message
from fedalt.methods.hilora import CLUSTER, LEAF, ROOT, HiLoRA
from fedalt.methods.lora import Lora
from fedalt.methods.product_means import ProductTotals, as_adapter
from fedalt.methods.subspaces import (
    eigengap,
    grouped,
    overlap,
    remember,
    spectral_clusters,
    subspace_distances,
)
from fedalt.training.group import Training
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = HiLoRA(lora=LORA, root_rounds=1, cluster_rounds=1)
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())
B = Name("s", ROOT, "B")


class Watch:
    """Carries orders out as told and keeps them by client."""

    def __init__(self, carry_out=pull):
        self.orders, self.carry_out = {}, carry_out

    def __call__(self, client_id, number, order):
        self.orders.setdefault(client_id, []).append(order)
        return self.carry_out(client_id, number, order)


def of_groups(client_id, number, order):
    """B of a and b spans the first two outputs, that of all others the last two."""
    tree = dict(order.tree)
    for name in order.train:
        if name.slot == HEAD:
            continue
        moved = torch.zeros_like(tree[name])
        if name.factor == "B":
            rows = moved[:2] if client_id in "ab" else moved[-2:]
            rows += torch.tensor([[1.0, 0.0], [0.1 * "abcd".index(client_id), 1.0]])
        else:
            moved += torch.eye(2, moved.shape[1]) * (1 + "abcd".index(client_id))
        tree[name] = moved
    return Fitted(tree, 10)


def spanned(*columns):
    """The basis of a client whose B has these columns on one site."""
    return {B: torch.tensor(columns, dtype=torch.float32).T}


def test_distances_of_subspaces_by_hand():
    half = 0.5**0.5
    bases = {
        "a": spanned([1, 0, 0, 0], [0, 1, 0, 0]),
        "b": spanned([3, 2, 0, 0], [1, -5, 0, 0]),  # other columns, the same plane
        "c": spanned([0, 0, 2, 0], [0, 0, 0, 1]),  # at right angles to it
        "d": spanned([1, 0, 0, 0], [0, half, half, 0]),  # one direction shared, one at 45 degrees
    }
    expected = [[0, 0, 1, 0.25], [0, 0, 1, 0.25], [1, 1, 0, 0.75], [0.25, 0.25, 0.75, 0]]
    found = subspace_distances(bases)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_distances_are_means_over_sites():
    other = B._replace(site="t")
    bases = {
        "a": spanned([1, 0]) | {other: torch.tensor([[1.0], [0.0]])},
        "b": spanned([1, 0]) | {other: torch.tensor([[0.0], [1.0]])},
    }
    assert subspace_distances(bases)[0, 1] == pytest.approx(0.5)


def blocks(*sizes, near=0.1, away=1.0):
    """Distances of clients in groups of these sizes."""
    of = torch.cat([torch.full((size,), group) for group, size in enumerate(sizes)])
    far = torch.where(of[:, None] == of, near, away).double()
    return far.fill_diagonal_(0)


def test_the_widest_gap_of_the_laplacian_by_hand():
    # Affinities 1 within two pairs and 1/3 between them: every row sums to 8/3, the Laplacian's
    # eigenvalues are 0, 1 - (2 - 2/3) / (8/3) = 1/2, 1 and 1: the widest gap from 2 on is behind 2.
    near = 1 - (blocks(2, 2) > 0.5).double() * 2 / 3
    root = near.sum(1).rsqrt()
    values = torch.linalg.eigvalsh(torch.eye(4) - root[:, None] * near * root)
    torch.testing.assert_close(values, torch.tensor([0, 0.5, 1, 1]).double(), rtol=0, atol=1e-9)
    assert eigengap(near, 3) == 2


@pytest.mark.parametrize("sizes", [(3, 2), (4, 4), (3, 2, 2), (2, 2, 2, 2)])
def test_spectral_clusters_find_groups_and_their_number(sizes):
    labels = [group for group, size in enumerate(sizes) for _ in range(size)]
    found = spectral_clusters(blocks(*sizes), 8)
    assert len(set(zip(labels, found, strict=True))) == len(sizes) == len(set(found))
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    again = spectral_clusters(blocks(*sizes)[mixed][:, mixed], 8)
    together = [[one == other for one in found] for other in found]
    back = mixed.argsort().tolist()
    assert together == [[again[i] == again[j] for i in back] for j in back]
    assert len(set(spectral_clusters(blocks(*sizes), 2))) == 2


def test_few_or_equal_clients_are_one_cluster():
    assert spectral_clusters(blocks(1, 1), 8) == (0, 0)
    assert spectral_clusters(torch.zeros(5, 5).double(), 8) == (0,) * 5
    assert spectral_clusters(blocks(3, 3), 1) == (0,) * 6


def test_a_basis_has_length_one_and_is_smoothed_over_rounds():
    def adapter(*column):
        return spanned(list(column)) | {B._replace(factor="A"): torch.ones(1, 3)}

    bases = {}
    remember(bases, "a", adapter(3, 4), 0.75)
    torch.testing.assert_close(bases["a"], spanned([0.6, 0.8]))
    remember(bases, "a", adapter(0, 9), 0.75)
    torch.testing.assert_close(bases["a"], spanned([0.45, 0.85]))
    remember(bases, "b", adapter(0, 0), 0.75)
    remember(bases, "b", {}, 0.75)
    assert bases.keys() == {"a"}


def test_who_comes_later_joins_the_nearest_cluster():
    bases = {
        "a": spanned([1, 0, 0]),
        "b": spanned([0, 1, 0]),
        "c": spanned([0, 2, 1]),
        "new": spanned([0, 1, 1]),
    }
    assert grouped(bases, {"a": 0, "b": 1, "c": 1}, 8) == {"a": 0, "b": 1, "c": 1, "new": 1}
    known = {"a": 0, "b": 1, "c": 1, "new": 0}
    assert grouped(bases, known, 8) is known
    assert grouped({}, {}, 8) == {}


def test_the_penalty_by_hand():
    tree = {
        Name("s", ROOT, "B"): torch.tensor([[1.0], [0.0]]),
        Name("s", CLUSTER, "B"): torch.tensor([[0.0], [2.0]]),
        Name("s", LEAF, "B"): torch.tensor([[3.0], [5.0]]),
        Name("s", LEAF, "A"): torch.tensor([[9.0]]),
    }
    assert overlap(LEAF, [ROOT], 0.1, tree).item() == pytest.approx(0.1 * 9)
    assert overlap(LEAF, [ROOT, CLUSTER], 0.1, tree).item() == pytest.approx(0.1 * (9 + 100))
    assert overlap(CLUSTER, [ROOT], 0.1, tree).item() == 0


def test_a_mean_of_products_is_exact_where_the_rank_holds_it_and_b_is_orthonormal():
    one = {B: torch.tensor([[1.0], [2.0], [0.0]]), B._replace(factor="A"): torch.ones(1, 4)}
    other = {B: torch.tensor([[0.0], [1.0], [1.0]]), B._replace(factor="A"): torch.eye(1, 4)}
    totals = ProductTotals()
    totals.add(0, Message(one, {"weight": 1.0}))
    totals.add(0, Message(other, {"weight": 3.0}))
    totals.add(1, Message(other, {"weight": 5.0}))
    (_, first), (_, second) = totals.means()
    before = {
        B._replace(slot="x"): torch.ones(3, 3),
        Name("s", "x", "A"): torch.arange(12.0).reshape(3, 4),
    }
    found = as_adapter(first, before)
    b, a = found[B._replace(slot="x")], found[Name("s", "x", "A")]
    dense = 0.25 * one[B] @ torch.ones(1, 4) + 0.75 * other[B] @ torch.eye(1, 4)
    torch.testing.assert_close(b @ a, dense)
    torch.testing.assert_close((b.T @ b)[:2, :2], torch.eye(2))
    # The third row has no direction: A as before, a B that changes nothing.
    assert torch.equal(a[2], torch.arange(8.0, 12.0))
    assert not b[:, 2].any()
    of_one = as_adapter(second, before)
    torch.testing.assert_close(
        of_one[B._replace(slot="x")] @ of_one[Name("s", "x", "A")], other[B] @ torch.eye(1, 4)
    )


def test_stages_train_one_adapter_each_and_freeze_those_before():
    watch = Watch(of_groups)
    _, costs = simulate(METHOD, ["abcd"] * 4, train=watch)
    slots = [tuple(slot.name for slot in order.plan.slots) for order in watch.orders["a"]]
    assert slots == [(ROOT,), (ROOT, CLUSTER), (ROOT, CLUSTER, LEAF), (ROOT, CLUSTER, LEAF)]
    trained = [{name.slot for name in order.train} - {HEAD} for order in watch.orders["a"]]
    assert trained == [{ROOT}, {CLUSTER}, {LEAF}, {LEAF}]
    assert all(
        order.plan.combine == Sum((1.0,) * len(order.plan.slots)) for order in watch.orders["a"]
    )
    assert [order.penalty is None for order in watch.orders["a"]] == [True, False, False, False]
    _, second, third, fourth = watch.orders["a"]
    assert trees.equal(select(second.tree, ROOT), select(fourth.tree, ROOT))
    assert trees.equal(select(third.tree, CLUSTER), select(fourth.tree, CLUSTER))
    assert not trees.equal(select(second.tree, CLUSTER), select(third.tree, CLUSTER))
    assert [cost.upload_bytes > 0 for cost in costs[::4]] == [True, True, False, False]


def test_clients_of_one_subspace_share_a_cluster_and_a_root_is_the_mean_of_products():
    states, _ = simulate(METHOD, ["abcd"], train=of_groups)
    server = states["server"]
    assert server.groups["a"] == server.groups["b"] != server.groups["c"] == server.groups["d"]
    for name in (name for name in select(server.adapters, ROOT) if name.factor == "B"):
        uploads = [of_groups(c, 0, FirstFit).tree for c in "abcd"]
        products = [up[name] @ up[name._replace(factor="A")] for up in uploads]
        u, s, v = torch.linalg.svd(sum(products) / 4)
        cut = u[:, :2] * s[:2] @ v[:2]
        found = server.adapters[name] @ server.adapters[name._replace(factor="A")]
        torch.testing.assert_close(found, cut, rtol=0, atol=1e-5)
    simulate(METHOD, ["abcd"], states, train=of_groups)
    serving = served(METHOD, states, "abcd", of_groups)
    clusters = {c: select(serving[c].tree, CLUSTER) for c in "abcd"}
    assert trees.equal(clusters["a"], clusters["b"])
    assert trees.equal(clusters["c"], clusters["d"])
    assert not trees.equal(clusters["a"], clusters["c"])


class FirstFit:
    """An order of the first round."""

    tree = METHOD.init_server(START).adapters
    train = frozenset(name for name in tree if name.slot == ROOT)


def test_a_latecomer_trains_the_root_to_be_grouped_and_changes_nobody():
    states, _ = simulate(METHOD, ["abc"] * 2, train=of_groups)
    before = states["server"]
    watch = Watch(of_groups)
    assert [slot.name for slot in served(METHOD, states, ["d"])["d"].plan.slots] == [ROOT]
    simulate(METHOD, ["d"], states, train=watch)
    after = states["server"]
    (order,) = watch.orders["d"]
    assert {name.slot for name in order.train} - {HEAD} == {ROOT}
    assert trees.equal(after.adapters, before.adapters)
    assert after.groups == {**before.groups, "d": before.groups["c"]}
    serving = served(METHOD, states, ["d"])["d"]
    assert [slot.name for slot in serving.plan.slots] == [ROOT, CLUSTER, LEAF]


def test_a_new_cluster_begins_as_everybodys_draw():
    states, _ = simulate(METHOD, ["abcd"], train=of_groups)
    drawn = select(METHOD.init_server(START).adapters, CLUSTER)
    message = METHOD.broadcast(states["server"], "a")
    assert trees.equal(select(message.tree, CLUSTER), drawn)
    assert not any(tensor.any() for name, tensor in drawn.items() if name.factor == "B")
    shared = METHOD.shared(METHOD.init_client(START, "a"), message)
    assert [slot.name for slot in shared.plan.slots] == [ROOT, CLUSTER]


def test_numbers_sent_in_each_stage():
    states, _ = simulate(METHOD, ["abcd"], train=of_groups)
    sent = [trees.numbers(METHOD.broadcast(METHOD.init_server(START), "a").tree)]
    for _ in range(2):
        sent.append(trees.numbers(METHOD.broadcast(states["server"], "a").tree))
        simulate(METHOD, ["abcd"], states, train=of_groups)
    assert sent == [P, 2 * P, 2 * P]


def test_a_real_model_with_a_strong_penalty_keeps_its_cluster_away_from_the_root():
    base = base_of()
    method = replace(METHOD, lora=Lora(rank=2, alpha=8, dropout=0.0))
    init = start_of(base)
    server = method.init_server(init)
    stream = torch.Generator().manual_seed(0)
    root = trees.apply(
        lambda t: torch.randn(t.shape, generator=stream) * 0.3, select(server.adapters, ROOT)
    )
    cluster = select(server.adapters, CLUSTER)
    message = Message(trees.merge(root, cluster), {"stage": 1, "own": 0})
    data = [example("ab c", "xy"), example("dd", "z"), example("abc", "q"), example("e f", "xx")]
    left = []
    for weight in (0.0, 100.0):
        arm = replace(method, orthogonality=weight)
        order = next(arm.local(arm.init_client(init, "a"), message))
        tree = train(
            base, order, data, Training(lr=1e-2, batch_size=2, local_epochs=4), seed=3
        ).tree
        assert trees.equal(select(tree, ROOT), root)
        left.append(float(overlap(CLUSTER, [ROOT], 1.0, tree)))
    assert left[1] < 0.5 * left[0]


def test_before_there_is_a_cluster_a_broadcast_has_the_root_alone():
    message = METHOD.broadcast(METHOD.init_server(START), "a")
    assert message.facts == {"stage": 0, "own": -1}
    assert {name.slot for name in message.tree} == {ROOT}
    _, upload = run_one(METHOD.local(METHOD.init_client(START, "a"), message), pull, "a")
    assert {name.slot for name in upload.tree} == {ROOT}
    assert move(upload.tree, ROOT, ROOT)
