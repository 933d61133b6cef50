"""The oracles of FedIT and local-only training."""

import torch
from federation import EXAMPLES, SITES, pull, served, simulate

from fedalt.core.tree import Name, move
from fedalt.methods.fedit import SHARED, FedIT
from fedalt.methods.local import INDIVIDUAL, LocalOnly
from fedalt.methods.lora import Lora

LORA = Lora(rank=2, alpha=4, dropout=0.0)
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())


def test_fedit_averages_factor_by_factor():
    uploads = {}

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        uploads[client_id] = fitted.tree
        return fitted

    states, _ = simulate(FedIT(lora=LORA), [("a", "b", "c")], train=watch)
    for name, tensor in states["server"].adapter.items():
        mean = sum(tree[name] for tree in uploads.values()) / 3
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)


def test_fedit_by_examples_counts_a_client_by_its_data():
    uploads = {}

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        uploads[client_id] = fitted.tree
        return fitted

    method = FedIT(lora=LORA, weighting="examples")
    states, _ = simulate(method, [("a", "b")], train=watch)
    name = Name("block.0.q", SHARED, "A")
    a, b = EXAMPLES["a"], EXAMPLES["b"]
    expected = (a * uploads["a"][name] + b * uploads["b"][name]) / (a + b)
    torch.testing.assert_close(states["server"].adapter[name], expected, rtol=0, atol=1e-6)


def test_averaged_factors_miss_the_covariance_of_the_products():
    uploads = {}

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        uploads[client_id] = {name: t.double() for name, t in fitted.tree.items()}
        return fitted

    simulate(FedIT(lora=LORA), [("a", "b", "c")], train=watch)
    site = "block.0.q"
    a = torch.stack([tree[Name(site, SHARED, "A")] for tree in uploads.values()])
    b = torch.stack([tree[Name(site, SHARED, "B")] for tree in uploads.values()])
    residual = (b @ a).mean(0) - b.mean(0) @ a.mean(0)
    covariance = ((b - b.mean(0)) @ (a - a.mean(0))).mean(0)
    torch.testing.assert_close(residual, covariance, rtol=0, atol=1e-12)
    assert residual.abs().max() > 1e-3


def test_with_one_client_fedit_is_local_training():
    fedit, _ = simulate(FedIT(lora=LORA), [("a",)] * 3)
    alone, _ = simulate(LocalOnly(lora=LORA), [("a",)] * 3)
    ours = served(FedIT(lora=LORA), fedit, ["a"])["a"].tree
    theirs = served(LocalOnly(lora=LORA), alone, ["a"])["a"].tree
    theirs = {**theirs, **move(theirs, INDIVIDUAL, SHARED)}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_local_training_sends_nothing_and_depends_on_no_one():
    with_others, costs = simulate(LocalOnly(lora=LORA), [("a", "b", "c")] * 2)
    alone, _ = simulate(LocalOnly(lora=LORA), [("a",)] * 2)
    assert {cost.upload_bytes + cost.download_bytes for cost in costs} == {0}
    for name, tensor in alone["clients/a"].individual.items():
        assert torch.equal(tensor, with_others["clients/a"].individual[name])


def test_fedit_sends_its_adapter_both_ways():
    _, costs = simulate(FedIT(lora=LORA), [("a", "b")])
    for cost in costs:
        assert 0 < cost.upload_bytes - 4 * P < 4000
        assert 0 < cost.download_bytes - 4 * P < 4000
