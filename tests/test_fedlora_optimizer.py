"""The oracles of FedLoRA-Optimizer: lengths and directions, and who trains which of them."""

import pytest
import torch
from bases import base_of, example, start_of, train
from federation import SITES, START, pull, run_one, served, simulate

from fedalt.adapters.plan import HEAD
from fedalt.core import tree as trees
from fedalt.core.tree import Name
from fedalt.methods.contract import Message
from fedalt.methods.fedlora_optimizer import (
    SHARED,
    FedLoRAOptimizer,
    compose,
    decompose,
)
from fedalt.methods.lora import Lora
from fedalt.training.group import Training
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FedLoRAOptimizer(lora=LORA)
EVERYONE = ("a", "b", "c")
N, R = len(SITES), LORA.rank
INPUTS = sum(d_in for d_in, _ in SITES.values())
OUTPUTS = sum(d_out for _, d_out in SITES.values())
AXES = pytest.mark.parametrize("axis", ["rank", "column"])


def adapter(seed=0):
    stream = torch.Generator().manual_seed(seed)
    shapes = {"A": (2, 5), "B": (4, 2)}
    return {
        Name("s", SHARED, factor): torch.randn(shape, generator=stream)
        for factor, shape in shapes.items()
    }


def part(tree, factor):
    return {name: tensor for name, tensor in tree.items() if name.factor == factor}


@AXES
def test_what_is_composed_of_its_parts_is_what_it_was(axis):
    whole = adapter()
    whole[Name("s", SHARED, "B")][:, 1] = 0.0
    again = compose(decompose(whole, axis), axis)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)
    assert not again[Name("s", SHARED, "B")][:, 1].any()


def test_a_column_that_grows_changes_one_length_and_nothing_else():
    whole = adapter()
    before = decompose(whole, "rank")
    whole[Name("s", SHARED, "B")][:, 1] *= 3
    after = decompose(whole, "rank")
    factors = torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(
        after[Name("s", SHARED, "b")], before[Name("s", SHARED, "b")] * factors
    )
    for factor in "aUV":
        name = Name("s", SHARED, factor)
        torch.testing.assert_close(after[name], before[name])


@AXES
def test_the_loss_never_pulls_along_a_direction_itself(axis):
    parts = decompose(trees.cast(adapter(), torch.float64), axis)
    u = Name("s", SHARED, "U")
    parts[u] = (2.5 * parts[u]).requires_grad_()
    sites = compose(parts, axis)
    stream = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, width, generator=stream, dtype=torch.float64) for width in (5, 4))
    out = x @ sites[Name("s", SHARED, "A")].T @ sites[Name("s", SHARED, "B")].T
    (gradient,) = torch.autograd.grad((out - y).square().mean(), [parts[u]])
    along = (gradient * parts[u]).sum(1 if axis == "rank" else 0)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-12)


@AXES
def test_directions_have_length_one_after_every_round(axis):
    method = FedLoRAOptimizer(lora=LORA, a_axis=axis)
    states = None
    for cohort in (EVERYONE, EVERYONE, ("a", "b"), EVERYONE):
        states, _ = simulate(method, [cohort], states)
        for name, tensor in states["server"].parts.items():
            if name.factor in "UV":
                lengths = tensor.norm(dim=1 if name.factor == "U" and axis == "rank" else 0)
                torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_directions_that_cancel_each_other_stay_what_they_were():
    states, _ = simulate(METHOD, [EVERYONE])
    server = states["server"]
    up = part(server.parts, "U")
    replies = [
        (client, Message(trees.scale(up, sign), {"weight": 1.0}))
        for client, sign in (("a", 1.0), ("b", -1.0))
    ]
    assert trees.equal(METHOD.aggregate(server, replies).parts, server.parts)


def test_stages_follow_each_other_and_train_what_they_should():
    method = FedLoRAOptimizer(lora=LORA, global_rounds=2)
    orders, uploads = [], []

    def watch(client_id, number, order):
        orders.append(order)
        return pull(client_id, number, order)

    states = None
    for _ in range(6):
        states, costs = simulate(method, [("a",)], states, train=watch)
        uploads.append(costs[0])
    trained = [{name.factor for name in order.train if name.slot != HEAD} for order in orders]
    assert trained == [{"A", "B"}, {"U"}, {"U"}] * 2
    counts = [trees.numbers({n: o.tree[n] for n in o.train if n.slot != HEAD}) for o in orders]
    assert counts[:2] == [R * (INPUTS + OUTPUTS), R * INPUTS]


@AXES
def test_directions_are_sent_at_length_one_however_far_training_has_moved_them(axis):
    method = FedLoRAOptimizer(lora=LORA, a_axis=axis)
    states, _ = simulate(method, [EVERYONE])
    server, client = states["server"], states["clients/a"]

    def stretch(client_id, number, order):
        return Fitted({n: 3 * t if n in order.train else t for n, t in order.tree.items()}, 10)

    message = method.broadcast(server, "a")
    _, upload = run_one(method.local(client, message), stretch, "a")
    assert message.facts["stage"] == "global"
    assert {name.factor for name in upload.tree} == {"U"}
    for name, tensor in upload.tree.items():
        torch.testing.assert_close(tensor, server.parts[name])


def test_the_global_stage_changes_directions_of_a_alone():
    states, _ = simulate(METHOD, [EVERYONE])
    before = dict(states["server"].parts)
    simulate(METHOD, [EVERYONE], states)
    changed = {n.factor for n, t in states["server"].parts.items() if not torch.equal(t, before[n])}
    assert changed == {"U"}


def test_what_is_sent_has_the_size_of_the_closed_forms():
    lengths = 2 * R * N
    states = None
    for numbers in (R * (INPUTS + OUTPUTS) + lengths, R * INPUTS):
        message = METHOD.broadcast(states["server"] if states else METHOD.init_server(START), "a")
        _, upload = run_one(METHOD.local(METHOD.init_client(START, "a"), message), pull, "a")
        assert trees.numbers(upload.tree) == numbers
        assert trees.numbers(message.tree) == R * (INPUTS + OUTPUTS) + lengths
        states, _ = simulate(METHOD, [("a",)], states)


def test_clients_that_are_alike_leave_the_server_what_each_of_them_has():
    together, _ = simulate(METHOD, [EVERYONE] * 2, train=lambda _, n, order: pull("a", n, order))
    alone, _ = simulate(METHOD, [("a",)] * 2)
    for name, tensor in alone["server"].parts.items():
        torch.testing.assert_close(together["server"].parts[name], tensor, rtol=1e-6, atol=1e-7)


def test_before_serving_a_client_moves_lengths_of_b_alone():
    orders = []

    def watch(client_id, number, order):
        orders.append(order)
        return pull(client_id, number, order)

    states, _ = simulate(METHOD, [EVERYONE] * 2)
    serving = served(METHOD, states, ["a"], watch)["a"]
    (order,) = orders
    assert {name.factor for name in order.train} == {"b"}  # the head stays as the rounds made it
    assert sum(order.tree[n].numel() for n in order.train) == R * N
    assert trees.equal(trees.select(serving.tree, HEAD), states["clients/a"].head)
    assert order.rate == 10.0
    common = METHOD.shared(states["clients/a"], METHOD.broadcast(states["server"], "a"))
    for site in SITES:
        a, b = Name(site, SHARED, "A"), Name(site, SHARED, "B")
        assert torch.equal(serving.tree[a], common.tree[a])
        ratio = serving.tree[b] / common.tree[b]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-6)


def personal(base, l2):
    """What a client of a real model makes of b, and how far that is from the mean."""
    method = FedLoRAOptimizer(lora=LORA, l2=l2, personal_epochs=30)
    init = start_of(base)
    examples = [example("ab c", "xy"), example("dd", "z")]
    training = Training(lr=1e-2, batch_size=2, local_epochs=5, weight_decay=0.0)

    def fit(client_id, number, order):
        return Fitted(train(base, order, examples, training, seed=0).tree, len(examples))

    client, server = method.init_client(init, "a"), method.init_server(init)
    client, upload = run_one(method.local(client, method.broadcast(server, "a")), fit, "a")
    server = method.aggregate(server, [("a", upload)])
    message = method.broadcast(server, "a")
    tree = run_one(method.deploy(client, message), fit, "a").tree
    b = part(decompose(trees.select(tree, SHARED), "rank"), "b")
    return sum(float((b[name] - message.tree[name]).norm()) for name in b)


def test_the_penalty_holds_the_lengths_near_their_mean():
    base = base_of()
    free, held = personal(base, 0.0), personal(base, 100.0)
    assert free > 0.05
    assert held < free / 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"global_rounds": -1}, "global_rounds=-1"),
        ({"personal_rate": 0.0}, "personal_rate=0.0"),
        ({"l2": -1.0}, "l2=-1.0"),
    ],
)
def test_impossible_settings_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        FedLoRAOptimizer(**wrong)
