"""The oracles of FedTreeLoRA: layers, distances and cuts by hand, means within and without, lam."""

from dataclasses import replace

import pytest
import torch
from bases import base_of, example, start_of, train
from federation import SITES, START, assert_same_servings, served, simulate

from fedalt.adapters.plan import HEAD
from fedalt.core import tree as trees
from fedalt.core.tree import Name, move, select
from fedalt.methods.contract import MemoryLedger, Message, Serving
from fedalt.methods.fedit import FedIT
from fedalt.methods.fedtree_lora import FedTreeLoRA
from fedalt.methods.layer_cuts import cuts, grown, layer_distances, layer_of, layers_of
from fedalt.methods.layer_means import EXPERT, EXTERNAL, LAM, means_by_layer, means_for, mixed
from fedalt.methods.local import LocalOnly
from fedalt.methods.lora import Lora
from fedalt.training.group import Training
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FedTreeLoRA(lora=LORA, warm_up=1, width=2)
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())
VALUE = {"a": 1.0, "b": 1.2, "c": -1.0, "d": -1.2}


def two_groups_in_the_second_layer(client_id, number, order):
    """B of the first layer is the same for all, that of the second is the client's own number."""
    tree = dict(order.tree)
    for name in order.train:
        if name.slot == EXPERT:
            value = 1.0 if "block.0" in name.site or name.factor == "A" else VALUE[client_id]
            tree[name] = torch.full_like(tree[name], value)
        elif name.slot == LAM:
            tree[name] = torch.full_like(tree[name], VALUE[client_id])
    return Fitted(tree, 10)


def pairs_on(*values, sites=("s.0.q",)):
    """Adapters of rank 1 whose B are these numbers, by site."""
    return [
        {
            Name(site, EXPERT, factor): torch.tensor([[number if factor == "B" else 1.0]])
            for site, number in zip(sites, of_client, strict=True)
            for factor in "AB"
        }
        for of_client in values
    ]


def test_layers_are_found_in_the_paths_of_sites_and_ordered_by_number():
    assert layer_of("model.layers.10.self_attn.q_proj") == "model.layers.10"
    assert layer_of("transformer.h.3.mlp.0.fc") == "transformer.h.3"
    assert layer_of("embed_in") == "embed_in"
    sites = [f"model.layers.{n}.mlp.{part}" for n in (10, 2, 0) for part in ("up", "down")]
    assert layers_of(sites) == ["model.layers.0", "model.layers.2", "model.layers.10"]
    sites = [f"model.{part}.layers.{n}.fc1" for part in ("decoder", "encoder") for n in (1, 0)]
    assert layers_of(sites) == [
        f"model.{part}.layers.{n}" for part in ("encoder", "decoder") for n in (0, 1)
    ]


def test_distances_by_hand_over_all_sites_of_a_layer():
    sites = ("h.0.q", "h.0.v", "h.1.q")
    far = layer_distances(pairs_on((0, 0, 1), (3, 4, 1), (0, 4, 3), sites=sites))
    assert list(far) == ["h.0", "h.1"]
    assert far["h.0"].tolist() == [[0, 5, 4], [5, 0, 3], [4, 3, 0]]
    assert far["h.1"].tolist() == [[0, 0, 2], [0, 0, 2], [2, 2, 0]]


def line(*at):
    """Distances of points on a line."""
    at = torch.tensor(at, dtype=torch.float64)
    return (at[:, None] - at).abs()


def test_layers_are_cut_finer_and_finer_along_one_tree():
    alike, halves = line(*[0] * 8), line(*[0] * 4, *[9] * 4)
    pairs = line(0, 0, 5, 5, 50, 50, 55, 55)
    found = cuts({"0": alike, "1": halves, "2": pairs, "3": halves}, 3, 0.1)
    assert found["0"] == (0,) * 8  # no silhouette reaches 0.1
    assert len(set(found["1"])) == 2
    assert len(set(found["1"][:4])) == len(set(found["1"][4:])) == 1
    assert len(set(found["2"])) == 4
    assert len(set(found["3"])) == 4  # two groups would fit, but a finer cut came before
    for coarse, fine in (("1", "2"), ("2", "3")):
        assert len(set(zip(found[coarse], found[fine], strict=True))) == len(set(found[fine]))


def test_a_cut_adds_at_most_width_minus_one_groups_and_stays_below_the_number_of_clients():
    spread = {str(layer): line(0, 1, 10, 11, 30, 31) for layer in range(6)}
    for width in (1, 2, 3):
        counts = [len(set(labels)) for labels in cuts(spread, width, -1.0).values()]
        before = [1, *counts[:-1]]
        assert all(c <= now < c + width for c, now in zip(before, counts, strict=True))
        assert counts[-1] == (1 if width == 1 else 3)  # three pairs: no finer cut is better
    assert cuts({"0": line(0, 9)}, 5, -1.0) == {"0": (0, 0)}


def test_one_group_is_kept_unless_a_silhouette_is_above_its_score():
    # 0, 0, 1, 1: a = 0 and b = 1 for all, the silhouette of two groups is 1.
    assert len(set(cuts({"0": line(0, 0, 1, 1)}, 2, 0.99)["0"])) == 2
    assert len(set(cuts({"0": line(0, 0, 1, 1)}, 2, 1.0)["0"])) == 1


def test_means_of_groups_and_of_all_others_by_hand():
    uploads = MemoryLedger()
    values = {"a": (1, 10), "b": (3, 20), "c": (8, 60)}
    for (client, of), weight in zip(values.items(), (1.0, 3.0, 1.0), strict=True):
        (tree,) = pairs_on(of, sites=("h.0.q", "h.1.q"))
        uploads = uploads.put(client, Message(tree, {"weight": weight}))
    groups = {"h.0": {"a": 0, "b": 0, "c": 0}, "h.1": {"a": 0, "b": 0, "c": 1}}
    means = means_by_layer(uploads, groups)

    def of_client(client):
        tree = means_for(client, means, groups)
        return {(n.slot, n.site): t.item() for n, t in tree.items() if n.factor == "B"}

    first = (1 + 3 * 3 + 8) / 5
    of_a = {(EXPERT, "h.0.q"): first, (EXPERT, "h.1.q"): 17.5, (EXTERNAL, "h.1.q"): 60}
    assert of_client("a") == of_client("b") == pytest.approx(of_a)
    of_c = {(EXPERT, "h.0.q"): first, (EXPERT, "h.1.q"): 60, (EXTERNAL, "h.1.q"): 17.5}
    assert of_client("c") == pytest.approx(of_c)


def test_who_comes_later_joins_the_groups_of_the_nearest():
    uploads = MemoryLedger()
    for client, of in {"a": (0, 0), "b": (5, 0), "new": (4, 1)}.items():
        (tree,) = pairs_on(of, sites=("h.0.q", "h.1.q"))
        uploads = uploads.put(client, Message(tree))
    groups = {"h.0": {"a": 0, "b": 0}, "h.1": {"a": 0, "b": 1}}
    found = grown(groups, uploads, 2, 0.1)
    assert found == {"h.0": {"a": 0, "b": 0, "new": 0}, "h.1": {"a": 0, "b": 1, "new": 1}}
    assert grown(found, uploads, 2, 0.1) is found
    assert grown({}, MemoryLedger(), 2, 0.1) == {}


def test_layers_in_which_clients_agree_are_shared_and_the_others_split():
    states, _ = simulate(METHOD, ["abcd"], train=two_groups_in_the_second_layer)
    groups = states["server"].groups
    assert set(groups["block.0"].values()) == {0}
    second = groups["block.1"]
    assert second["a"] == second["b"] != second["c"] == second["d"]
    message = METHOD.broadcast(states["server"], "a")
    b = {(n.slot, n.site[:7]): t[0, 0].item() for n, t in message.tree.items() if n.factor == "B"}
    expected = {(EXPERT, "block.0"): 1.0, (EXPERT, "block.1"): 1.1, (EXTERNAL, "block.1"): -1.1}
    assert b == pytest.approx(expected)


def test_what_is_bound_weighs_both_means_by_lam():
    expert, others = Name("h.0.q", EXPERT, "B"), Name("h.0.q", EXTERNAL, "B")
    (tree,) = pairs_on((2.0,), sites=("h.0.q",))
    (rest,) = pairs_on((6.0,), sites=("h.0.q",))
    lam = {Name("h.0", LAM, "weight"): torch.tensor([3.0]).log() / 10}  # a sigmoid of 3/4
    bound = mixed({**tree, **move(rest, EXPERT, EXTERNAL), **lam}, lam_rate=10.0)
    assert (bound[expert].item(), bound[others].item()) == pytest.approx((1.5, 1.5))
    assert (
        bound[expert._replace(factor="A")].item() == bound[others._replace(factor="A")].item() == 1
    )
    alone = mixed({**tree, **lam}, lam_rate=10.0)
    assert alone.keys() == tree.keys()
    assert alone[expert].item() == 2.0


def test_the_rate_of_lam_multiplies_the_number_and_not_its_gradient():
    (tree,) = pairs_on((2.0,), sites=("h.0.q",))
    (rest,) = pairs_on((6.0,), sites=("h.0.q",))
    z = torch.zeros(1, requires_grad=True)  # lam is one half, and a sigmoid's slope 1/4
    lam = {Name("h.0", LAM, "weight"): z}
    bound = mixed({**tree, **move(rest, EXPERT, EXTERNAL), **lam}, lam_rate=300.0)
    total = sum(t.sum() for n, t in bound.items() if n.factor == "B")  # lam 2 + (1 - lam) 6
    assert total.item() == 4.0
    (gradient,) = torch.autograd.grad(total, [z])
    assert gradient.item() == (2 - 6) / 4


def test_before_groups_are_found_everyone_is_local_only():
    method = replace(METHOD, warm_up=9)
    cohorts = [("a", "b"), ("a",), ("a", "b")]
    ours, costs = simulate(method, cohorts)
    assert all(cost.upload_bytes == 0 for cost in costs)
    theirs, _ = simulate(LocalOnly(lora=LORA), cohorts)
    mine = served(method, ours, "ab")
    for client_id, serving in served(LocalOnly(lora=LORA), theirs, "ab").items():
        own = mine[client_id].tree
        assert trees.equal(move(own, EXPERT, "individual"), select(serving.tree, "individual"))
        assert trees.equal(select(own, HEAD), select(serving.tree, HEAD))


def test_one_group_in_every_layer_is_fedit_from_the_means_on():
    method = replace(METHOD, width=1)
    ours, _ = simulate(method, ["abc"] * 3)
    theirs, _ = simulate(FedIT(lora=LORA), ["abc"] * 3)
    for client_id, serving in served(FedIT(lora=LORA), theirs, "abc").items():
        moved = {**move(serving.tree, "shared", EXPERT), **select(serving.tree, HEAD)}
        expected = Serving(LORA.plan(EXPERT), moved)
        assert_same_servings({"": expected}, {"": served(method, ours, [client_id])[client_id]})


def test_lam_and_the_expert_train_and_others_stay_frozen_in_a_real_model():
    base = base_of()
    method = replace(METHOD, lora=Lora(rank=2, alpha=8, dropout=0.0))
    init = start_of(base)
    stream = torch.Generator().manual_seed(0)
    drawn = init.adapter(method.lora.slot(EXPERT))

    def adapter(slot):
        tree = trees.apply(lambda t: torch.randn(t.shape, generator=stream) * 0.3, drawn)
        return move(tree, EXPERT, slot)

    layers = layers_of(init.sites)
    others = {n: t for n, t in adapter(EXTERNAL).items() if layer_of(n.site) == layers[-1]}
    message = Message({**adapter(EXPERT), **others}, {"round": 3})
    client = method.init_client(init, "a")
    order = next(method.local(client, message))
    data = [example("ab c", "xy"), example("dd", "z"), example("abc", "q"), example("e f", "xx")]
    tree = train(base, order, data, Training(lr=1e-2, batch_size=2), seed=3).tree
    assert trees.equal(select(tree, EXTERNAL), others)
    assert not any(
        torch.equal(tensor, message.tree[name]) for name, tensor in select(tree, EXPERT).items()
    )
    moved = {name.site: abs(t.item()) for name, t in select(tree, LAM).items()}
    assert list(moved) == layers
    assert moved.pop(layers[-1]) > 1e-3
    assert set(moved.values()) <= {0.0}  # there are no others in these layers


def test_numbers_sent():
    states, _ = simulate(METHOD, ["abcd"], train=two_groups_in_the_second_layer)
    sent = METHOD.broadcast(states["server"], "a")
    second = sum(LORA.rank * (d_in + d_out) for site, (d_in, d_out) in SITES.items() if "1" in site)
    assert trees.numbers(sent.tree) == P + second
    assert trees.numbers(METHOD.broadcast(METHOD.init_server(START), "a").tree) == 0
    assert trees.numbers(states["server"].latest["a"].tree) == P


def test_an_absent_client_is_in_the_means_with_its_latest_upload():
    states, _ = simulate(METHOD, ["abcd"], train=two_groups_in_the_second_layer)
    simulate(METHOD, ["a"], states, train=lambda c, n, o: two_groups_in_the_second_layer("b", n, o))
    b = {
        n.slot: t[0, 0].item()
        for n, t in METHOD.broadcast(states["server"], "a").tree.items()
        if n[::2] == ("block.1.q", "B")
    }
    assert b == pytest.approx({EXPERT: 1.2, EXTERNAL: -1.1})


def test_what_a_leaver_put_into_its_group_stays_in_what_the_others_go_on_from():
    name = Name("block.1.q", EXPERT, "B")

    def moved(client_id, number, order):
        """B of b begins far off, and everybody adds 1 in every round."""
        far = client_id == "b" and not order.tree[name].any()
        return Fitted({**order.tree, name: order.tree[name] + (100 if far else 1)}, 10)

    method = replace(METHOD, width=1, one_group=1.0)  # one group: FedIT
    states, _ = simulate(method, ["ab", "ab"], train=moved)
    after = method.without(states["server"], "b")
    assert method.broadcast(after, "a").tree[name][0, 0].item() == (100 + 1) / 2 + 1
    assert method.mingled


def test_who_leaves_is_out_of_every_mean_and_groups_stay():
    states, _ = simulate(METHOD, ["abcd"], train=two_groups_in_the_second_layer)
    server = states["server"]
    after = METHOD.without(server, "b")
    tree = METHOD.broadcast(after, "c").tree
    b = {n.slot: t[0, 0].item() for n, t in tree.items() if n[::2] == ("block.1.q", "B")}
    assert b == pytest.approx({EXPERT: -1.1, EXTERNAL: 1.0})
    assert not METHOD.broadcast(after, "b").tree
    assert after.groups == server.groups
    assert "b" not in after.latest
    assert "b" not in after.first
    again = METHOD.without(after, "b")
    assert trees.equal(again.experts, after.experts)
