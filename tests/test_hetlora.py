"""HetLoRA: weights by norm, missing rows as zeros, the first rows for each client, by hand."""

import pytest
import torch
from federation import SITES, START, pull, served, simulate

from fedalt.core.tree import Name
from fedalt.methods.contract import Message
from fedalt.methods.fedit import FedIT
from fedalt.methods.hetlora import HetLoRA
from fedalt.methods.lora import Lora
from fedalt.methods.low_rank_sums import Pair, squared_norm
from fedalt.methods.own_ranks import SHARED, Server

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = HetLoRA(lora=LORA, ranks={"a": 1, "b": 3})
A, B = Name("site", SHARED, "A"), Name("site", SHARED, "B")
# |B A| is |(3, 4)| = 5 for the first and |(9, 12)| = 15 for the second: weights 1/4 and 3/4.
SMALL = {A: torch.tensor([[3.0, 4.0]]), B: torch.tensor([[1.0], [0.0]])}
LARGE = {A: torch.eye(2), B: torch.tensor([[9.0, 0.0], [0.0, 12.0]])}


def aggregated(*adapters, server=Server()):  # noqa: B008 - frozen
    replies = [(str(at), Message(tree, {"weight": 1.0})) for at, tree in enumerate(adapters)]
    return METHOD.aggregate(server, replies)


def test_the_norm_of_a_product_needs_only_small_matrices():
    b, a = torch.randn(7, 3).double(), torch.randn(3, 5).double()
    assert squared_norm(Pair(b, a)) == pytest.approx(float((b @ a).square().sum()))
    assert squared_norm(Pair(SMALL[B], SMALL[A])) == 25
    assert squared_norm(Pair(LARGE[B], LARGE[A])) == 225


def test_a_mean_by_hand():
    mean = aggregated(SMALL, LARGE).adapter
    # Second row and column: their only owner's, times its weight, since the other's are zeros.
    torch.testing.assert_close(mean[A], torch.tensor([[1.5, 1.0], [0.0, 0.75]]))
    torch.testing.assert_close(mean[B], torch.tensor([[7.0, 0.0], [0.0, 9.0]]))


def test_the_norm_counts_all_sites_of_a_client_together():
    def at(site, tree, factor):
        return {name._replace(site=site): tensor * factor for name, tensor in tree.items()}

    # Products of norm 5 on both sites: sqrt(50); of 15 and, with B and A halved, 3.75.
    one = {**at("x", SMALL, 1), **at("y", SMALL, 1)}
    other = {**at("x", LARGE, 1), **at("y", LARGE, 0.5)}
    norms = 50**0.5, (15**2 + 3.75**2) ** 0.5
    mean = aggregated(one, other).adapter
    wanted = (norms[0] * SMALL[A] + norms[1] * torch.tensor([[0.5, 0.0]])) / sum(norms)
    torch.testing.assert_close(mean[A._replace(site="y")][:1], wanted)


def test_a_client_gets_its_first_rows():
    server = aggregated(SMALL, LARGE)
    ranks = {"a": 1, "b": 2, "c": 2}  # b has 3 rows, the server 2
    for client, rank in ranks.items():
        sent = METHOD.broadcast(server, client).tree
        assert torch.equal(sent[A], server.adapter[A][:rank])
        assert torch.equal(sent[B], server.adapter[B][:, :rank])


def test_equal_adapters_are_their_own_mean_and_equal_norms_give_fedit():
    torch.testing.assert_close(aggregated(LARGE, LARGE).adapter, LARGE)
    swapped = {A: LARGE[A], B: LARGE[B].flip(0, 1)}  # 12 and 9 on the diagonal: norm 15 again
    mean = aggregated(LARGE, swapped).adapter
    replies = [("0", Message(LARGE, {"weight": 1.0})), ("1", Message(swapped, {"weight": 1.0}))]
    fedit = FedIT(lora=LORA).aggregate(FedIT(lora=LORA).init_server(START), replies).adapter
    torch.testing.assert_close(mean, fedit)


def test_who_changed_nothing_counts_nothing():
    untrained = {A: torch.ones(3, 2), B: torch.zeros(2, 3)}
    torch.testing.assert_close(aggregated(untrained, SMALL).adapter, SMALL)
    assert aggregated(untrained, server=Server(LARGE)).adapter == LARGE


def test_rows_that_nobody_in_the_cohort_has_stay_as_they_are():
    server = aggregated(SMALL, server=Server(LARGE))
    torch.testing.assert_close(server.adapter[A], torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    torch.testing.assert_close(server.adapter[B], torch.tensor([[1.0, 0.0], [0.0, 12.0]]))


def test_bytes_are_those_of_a_clients_rank():
    states, costs = simulate(METHOD, [("a", "b", "c")] * 2)
    size = sum(d_in + d_out for d_in, d_out in SITES.values())
    for cost, rank in zip(costs, (1, 3, 2) * 2, strict=True):
        assert 0 < cost.upload_bytes - 4 * rank * size < 4000
    for client, rank in (("a", 1), ("b", 3), ("c", 2)):
        (slot,) = served(METHOD, states, [client], pull)[client].plan.slots
        assert (slot.rank, slot.scaling) == (rank, 2)
