"""The oracles of LoRA-FAIR: the ridge solution against the dense one, its limits, by hand."""

from dataclasses import replace

import pytest
import torch
from federation import EXAMPLES, SITES, START, served, simulate

from fedalt.core import tree as trees
from fedalt.core.tree import Name
from fedalt.methods.contract import Message
from fedalt.methods.fedit import FedIT
from fedalt.methods.lora import Lora
from fedalt.methods.lora_fair import SHARED, LoRAFAIR, Server, corrected
from fedalt.methods.low_rank_sums import Pair, weighted_stack
from fedalt.methods.mean import weighted_mean

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = LoRAFAIR(lora=LORA)
A, B = Name("s", SHARED, "A"), Name("s", SHARED, "B")
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())


def pairs_of(clients, seed=0, rank=2, d_out=4, d_in=5):
    stream = torch.Generator().manual_seed(seed)
    return [
        Pair(
            torch.randn(d_out, rank, generator=stream, dtype=torch.float64),
            torch.randn(rank, d_in, generator=stream, dtype=torch.float64),
        )
        for _ in range(clients)
    ]


def means_of(pairs):
    """The mean pair, the mean product as a pair, and as a matrix."""
    mean = Pair(sum(p.b for p in pairs) / len(pairs), sum(p.a for p in pairs) / len(pairs))
    stack = weighted_stack(*((1 / len(pairs), pair) for pair in pairs))
    return mean, stack, sum(p.b @ p.a for p in pairs) / len(pairs)


def test_two_clients_of_rank_one_by_hand():
    # B: 1 and 3, A: (1, 0) and (0, 1). Means: B = 2, A = (1/2, 1/2), W* = (1/2, 3/2).
    # (W* - B A) A^T = (-1/2, 1/2) A^T = 0: B A is as near as it comes, whatever the ridge.
    one, other = (
        Pair(torch.tensor([[b]]), torch.tensor([a]))
        for b, a in ((1.0, (1.0, 0.0)), (3.0, (0.0, 1.0)))
    )
    mean, stack, dense = means_of([one, other])
    assert dense.tolist() == [[0.5, 1.5]]
    assert corrected(mean, stack, 0.5).item() == pytest.approx(2.0)
    # A: (1, 0) and (3, 0). Means: B = 2, A = (2, 0), W* = (5, 0); A A^T = 4, (W* - B A) A^T = 2.
    one, other = (
        Pair(torch.tensor([[b]]), torch.tensor([[a, 0.0]])) for b, a in ((1.0, 1.0), (3.0, 3.0))
    )
    mean, stack, _ = means_of([one, other])
    assert corrected(mean, stack, 1.0).item() == pytest.approx(2 + 2 / 5)
    assert corrected(mean, stack, 1e-12).item() == pytest.approx(2.5)  # times A: W* itself


def test_the_correction_is_the_minimum_of_what_it_minimises():
    mean, stack, dense = means_of(pairs_of(3))

    def objective(b, ridge):
        return float((dense - b @ mean.a).square().sum() + ridge * (b - mean.b).square().sum())

    for ridge in (0.01, 1.0, 30.0):
        b = corrected(mean, stack, ridge).double()
        least = objective(b, ridge)
        assert least < objective(mean.b, ridge)
        for noise in torch.randn(20, *b.shape, dtype=torch.float64) * 0.05:
            assert objective(b + noise, ridge) > least - 1e-6


def test_without_a_ridge_what_is_left_is_orthogonal_to_the_rows_of_a():
    mean, stack, dense = means_of(pairs_of(3))
    left = dense - corrected(mean, stack, 1e-12).double() @ mean.a
    torch.testing.assert_close(left @ mean.a.T, torch.zeros(4, 2).double(), rtol=0, atol=1e-6)
    assert left.norm() < (dense - mean.b @ mean.a).norm()


def test_equal_clients_and_equal_a_need_no_correction():
    (pair,) = pairs_of(1)
    mean, stack, _ = means_of([pair] * 3)
    torch.testing.assert_close(corrected(mean, stack, 0.01), pair.b.float())
    others = [Pair(other.b, pair.a) for other in pairs_of(3, seed=1)]
    mean, stack, _ = means_of(others)
    torch.testing.assert_close(corrected(mean, stack, 0.01), mean.b.float())


def test_a_large_ridge_is_fedit():
    cohorts = [("a", "b", "c"), ("a", "c"), ("b",)]
    ours, _ = simulate(replace(METHOD, ridge=1e12), cohorts)
    theirs, _ = simulate(FedIT(lora=LORA), cohorts)
    expected = served(FedIT(lora=LORA), theirs, "abc")
    for client_id, serving in served(METHOD, ours, "abc").items():
        assert serving.plan == expected[client_id].plan
        for name, tensor in serving.tree.items():
            torch.testing.assert_close(tensor, expected[client_id].tree[name], rtol=0, atol=1e-6)


def test_the_server_corrects_b_on_every_site_by_weights_and_leaves_the_mean_of_a():
    uploads = []
    for client_id, seed in zip("abc", range(3), strict=True):
        tree = {
            name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
            for name, tensor in METHOD.init_server(START).adapter.items()
        }
        uploads.append((client_id, Message(tree, {"weight": float(EXAMPLES[client_id])})))
    found = METHOD.aggregate(METHOD.init_server(START), iter(uploads)).adapter
    mean = weighted_mean(uploads)
    assert found.keys() == mean.keys()
    for site in SITES:
        a, b = Name(site, SHARED, "A"), Name(site, SHARED, "B")
        assert torch.equal(found[a], mean[a])
        dense = sum(
            w * up.tree[b] @ up.tree[a] for (_, up), w in zip(uploads, (0.1, 0.3, 0.6), strict=True)
        )
        gram = mean[a] @ mean[a].T + 0.01 * torch.eye(2)
        by_hand = mean[b] + (dense - mean[b] @ mean[a]) @ mean[a].T @ torch.linalg.inv(gram)
        torch.testing.assert_close(found[b], by_hand, rtol=1e-4, atol=1e-4)


def test_a_round_without_uploads_changes_nothing():
    server = Server(METHOD.init_server(START).adapter)
    assert trees.equal(METHOD.aggregate(server, ()).adapter, server.adapter)


def test_bytes_are_those_of_fedit():
    _, costs = simulate(METHOD, ["abc"])
    _, plain = simulate(FedIT(lora=LORA), ["abc"])
    assert [(c.upload_bytes, c.download_bytes) for c in costs] == [
        (c.upload_bytes, c.download_bytes) for c in plain
    ]
    assert costs[0].upload_bytes > 4 * P


def test_a_ridge_of_zero_is_refused():
    with pytest.raises(ValueError, match="ridge=0, but it must be above 0"):
        LoRAFAIR(ridge=0)
