"""FedEx-LoRA: averages plus residual are the exact mean of products, on sites of two sizes."""

import pytest
import torch
from federation import EXAMPLES, SITES, START, MemoryStates, pull, served, simulate

from fedalt.core import tree as trees
from fedalt.core.tree import Name
from fedalt.methods.contract import Message
from fedalt.methods.fedex_lora import SHARED, FedExLoRA, Server
from fedalt.methods.fedit import FedIT
from fedalt.methods.frozen_side import FROZEN
from fedalt.methods.lora import Lora

LORA = Lora(rank=1, alpha=2, dropout=0.0)
METHOD = FedExLoRA(lora=LORA)
A, B = Name("site", SHARED, "A"), Name("site", SHARED, "B")


def product(tree, site, slot):
    if Name(site, slot, "A") not in tree:
        return 0.0
    a, b = (tree[Name(site, slot, factor)].double() for factor in "AB")
    return b @ a


def aggregated(*adapters, weights=None):
    weights = weights or [1.0] * len(adapters)
    replies = [
        (str(at), Message(tree, {"weight": weight}))
        for at, (tree, weight) in enumerate(zip(adapters, weights, strict=True))
    ]
    return METHOD.aggregate(Server({}), replies)


def test_a_residual_by_hand():
    one = {A: torch.tensor([[1.0, 0.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])}
    two = {A: torch.tensor([[0.0, 1.0, 0.0]]), B: torch.tensor([[0.0], [2.0]])}
    server = aggregated(one, two)
    assert torch.equal(server.adapter[A], torch.tensor([[0.5, 0.5, 0.0]]))
    assert torch.equal(server.adapter[B], torch.tensor([[1.0], [1.0]]))
    # The mean of products has 1 on the diagonal; the product of means has 1/2 in four places.
    wanted = torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0]]).double()
    torch.testing.assert_close(product(server.frozen, "site", FROZEN), wanted)
    assert len(server.frozen[Name("site", FROZEN, "A")]) == 1  # (K - 1) r


def random(*ranks, d_out=20, d_in=30):
    stream = torch.Generator().manual_seed(0)
    return [
        {
            A: torch.randn(rank, d_in, generator=stream),
            B: torch.randn(d_out, rank, generator=stream),
        }
        for rank in ranks
    ]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [10.0, 30.0, 60.0]])
def test_the_residual_is_the_covariance_of_the_factors(weights):
    clients = random(2, 2, 2)
    server = aggregated(*clients, weights=weights)
    shares = [weight / sum(weights) for weight in weights]
    means = {
        name: sum(p * tree[name].double() for p, tree in zip(shares, clients, strict=True))
        for name in (A, B)
    }
    covariance = sum(
        p * (tree[B].double() - means[B]) @ (tree[A].double() - means[A])
        for p, tree in zip(shares, clients, strict=True)
    )
    found = product(server.frozen, "site", FROZEN)
    torch.testing.assert_close(found, covariance, rtol=0, atol=1e-6)
    exact = sum(p * product(tree, "site", SHARED) for p, tree in zip(shares, clients, strict=True))
    whole = product(server.adapter, "site", SHARED) + found
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-5)
    assert len(server.frozen[Name("site", FROZEN, "A")]) == 4  # (K - 1) r


def test_equal_clients_and_a_client_alone_leave_no_residual():
    (client,) = random(2)
    for server in (aggregated(client), aggregated(*[client] * 3)):
        assert server.frozen == {}
        assert trees.equal(server.adapter, client)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_what_is_served_is_what_was_frozen_before_plus_the_mean_of_products(weighting):
    method = FedExLoRA(lora=LORA, weighting=weighting)
    weights = EXAMPLES if weighting == "examples" else dict.fromkeys(EXAMPLES, 1)
    states = MemoryStates()
    for _ in range(3):
        before = method.broadcast(states["server"], "a").tree if states else {}
        trained = {}

        def watch(client_id, number, order, trained=trained):
            fitted = pull(client_id, number, order)
            trained[client_id] = fitted.tree
            return fitted

        simulate(method, [("a", "b", "c")], states, train=watch)
        serving = served(method, states, ["a"])["a"]
        assert [slot.scaling for slot in serving.plan.slots] == [2.0, 2.0]
        for site in SITES:
            mean = sum(weights[k] * product(tree, site, SHARED) for k, tree in trained.items())
            exact = product(before, site, FROZEN) + mean / sum(weights.values())
            whole = sum(product(serving.tree, site, slot) for slot in (SHARED, FROZEN))
            torch.testing.assert_close(whole, exact, rtol=0, atol=1e-5)


def test_the_averages_are_those_of_fedit():
    states, _ = simulate(METHOD, [("a", "b", "c")])
    fedit, _ = simulate(FedIT(lora=LORA), [("a", "b", "c")])
    for name, tensor in fedit["server"].adapter.items():
        torch.testing.assert_close(states["server"].adapter[name], tensor)


def test_only_the_averages_are_trained_and_sent_back():
    orders = []

    def watch(client_id, number, order):
        orders.append(order)
        return pull(client_id, number, order)

    _, costs = simulate(METHOD, [("a", "b", "c")] * 3, train=watch)
    assert all({name.slot for name in order.train} == {SHARED, "head"} for order in orders)
    numbers = sum(d_in + d_out for d_in, d_out in SITES.values())
    for cost in costs:
        assert 0 < cost.upload_bytes - 4 * numbers < 4000
    # Down: averages and residuals, whose rank is (K - 1) r = 2 after a round.
    for cost in costs[3:6]:
        assert 0 < cost.download_bytes - 4 * 3 * numbers < 4000


def test_the_rank_of_all_residuals_ends_at_the_smaller_side_of_a_site():
    states = MemoryStates()
    for number in range(6):  # other targets in every round, or the residuals would be alike
        simulate(METHOD, ["abc"], states, lambda k, n, order, at=number: pull(f"{k}{at}", n, order))
    for site, shape in SITES.items():
        assert len(states["server"].frozen[Name(site, FROZEN, "A")]) == min(shape)


def test_at_first_it_is_plain_lora():
    serving = served(METHOD, MemoryStates(), ["a"])["a"]
    assert [slot.name for slot in serving.plan.slots] == [SHARED]
    assert trees.equal(trees.select(serving.tree, SHARED), START.adapter(LORA.slot(SHARED)))
