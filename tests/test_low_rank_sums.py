"""Sums of low-rank products without the full matrix, against the full matrix."""

import pytest
import torch

from fedalt.core.seeds import generator
from fedalt.methods.low_rank_sums import (
    Pair,
    add_rows,
    core_svd,
    energy_rank,
    factors,
    owner_mean,
    strongest,
    weighted_stack,
)

SHAPES = [(7, 9), (9, 7), (30, 20), (3, 12)]  # d_out, d_in; ranks below sum to more than 3 and 7
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
RANKS, WEIGHTS = (1, 4, 2, 3), (0.1, 0.4, 0.2, 0.3)
TAUS = [0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1.0]


def pairs(shape, ranks=RANKS):
    stream = generator("pairs", *shape)
    return [
        Pair(
            torch.randn(shape[0], rank, generator=stream),
            torch.randn(rank, shape[1], generator=stream),
        )
        for rank in ranks
    ]


def dense(weighed):
    return sum(weight * (pair.b.double() @ pair.a.double()) for weight, pair in weighed)


def product(found):
    return found.u * found.s @ found.v.T


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@each_shape
def test_a_stack_is_the_weighted_sum_of_the_products(shape):
    weighed = list(zip(WEIGHTS, pairs(shape), strict=True))
    stack = weighted_stack(*weighed)
    close(stack.b @ stack.a, dense(weighed))
    assert stack.a.dtype == stack.b.dtype == torch.float64


@each_shape
def test_a_stack_of_a_hundred_clients_stays_thin_and_exact(shape):
    weighed = [(0.01 * (k + 1), pair) for k, pair in enumerate(pairs(shape, RANKS * 25))]
    stack = weighted_stack(weighed[0])
    for each in weighed[1:]:
        stack = weighted_stack((1.0, stack), each)
        assert stack.a.shape[0] <= 2 * min(shape)
    close(stack.b @ stack.a, dense(weighed), 1e-9)


@each_shape
def test_the_core_has_the_singular_values_of_the_full_matrix(shape):
    weighed = list(zip(WEIGHTS, pairs(shape), strict=True))
    found = core_svd(weighted_stack(*weighed))
    wanted = torch.linalg.svdvals(dense(weighed))[: min(*shape, sum(RANKS))]
    close(found.s, wanted)
    close(product(found), dense(weighed))
    for basis in (found.u, found.v):
        close(basis.T @ basis, torch.eye(len(found.s), dtype=torch.float64))


@each_shape
def test_the_best_approximation_of_a_rank_misses_just_the_weaker_directions(shape):
    whole = dense(list(zip(WEIGHTS, pairs(shape), strict=True)))
    found = core_svd(weighted_stack(*zip(WEIGHTS, pairs(shape), strict=True)))
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    for rank in range(1, len(found.s)):
        cut = strongest(found, rank)
        close(product(cut), u[:, :rank] * s[:rank] @ v[:rank])
        close((whole - product(cut)).square().sum(), found.s[rank:].square().sum())
        # Nested: a lower rank is a truncation of a higher one.
        close(product(strongest(strongest(found, rank + 1), rank)), product(cut), 0)


@each_shape
def test_what_a_threshold_drops_is_at_most_its_share_of_the_energy(shape):
    found = core_svd(weighted_stack(*zip(WEIGHTS, pairs(shape), strict=True)))
    whole = product(found)
    ranks = [energy_rank(found.s, tau) for tau in TAUS]
    assert ranks == sorted(ranks)
    assert ranks[0] == 1
    for tau, rank in zip(TAUS, ranks, strict=True):
        error = (whole - product(strongest(found, rank))).square().sum()
        assert error <= (1 - tau) * whole.square().sum() + 1e-10
        if rank > 1:  # one direction less would not have been enough
            assert found.s[: rank - 1].square().sum() < tau * found.s.square().sum()
    close(product(strongest(found, ranks[-1])), whole, 1e-6)


def test_an_energy_rank_counted_by_hand():
    s = torch.tensor([3.0, 2.0, 1.0]).double()  # energies 9, 4, 1 of 14
    assert [energy_rank(s, tau) for tau in (0.5, 9 / 14, 0.65, 13 / 14, 0.95, 1)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert energy_rank(s[:0], 0.95) == 0


def test_of_one_client_there_are_as_many_directions_as_its_product_has():
    pair = pairs((7, 9), (4,))[0]
    twice = Pair(torch.cat([pair.b, pair.b], 1), torch.cat([pair.a, pair.a]))  # rank 4 in 8 rows
    for each in (pair, twice):
        found = core_svd(weighted_stack((1.0, each)))
        assert energy_rank(found.s, 1.0) == len(found.s) == 4


def test_a_product_that_is_zero_has_no_directions():
    found = core_svd(weighted_stack((1.0, Pair(torch.zeros(5, 2), torch.ones(2, 6)))))
    assert factors(found, "balanced").a.shape == (0, 6)
    assert factors(found, "balanced").b.shape == (5, 0)


@each_shape
def test_the_order_of_the_clients_turns_no_direction_round(shape):
    weighed = list(zip(WEIGHTS, pairs(shape), strict=True))
    one, other = (core_svd(weighted_stack(*order)) for order in (weighed, weighed[::-1]))
    for left, right in zip(one, other, strict=True):
        close(left, right, 1e-9)


def test_both_splits_have_the_same_product_and_one_of_them_balances_its_factors():
    found = core_svd(weighted_stack(*zip(WEIGHTS, pairs((7, 9)), strict=True)))
    balanced, in_b = factors(found, "balanced"), factors(found, "in_b")
    close(balanced.b @ balanced.a, product(found))
    close(in_b.b @ in_b.a, product(found))
    close(balanced.b.norm(dim=0), balanced.a.norm(dim=1))
    close(balanced.b.norm(dim=0), found.s.sqrt())
    close(in_b.a.norm(dim=1), torch.ones_like(found.s))


def mean(*weighed):
    total = None
    for weight, rows in weighed:
        total = add_rows(total, rows, weight)
    return owner_mean(total)


ONE = torch.tensor([[1.0, 2.0]])
TWO = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
THREE = torch.tensor([[5.0, 0.0], [7.0, 8.0], [9.0, 1.0]])


def test_a_row_is_the_mean_of_its_owners_alone():
    # First row: (1 * 1 + 1 * 3 + 2 * 5) / 4; second: (1 * 5 + 2 * 7) / 3; third: its owner's.
    wanted = [[14 / 4, 6 / 4], [19 / 3, 22 / 3], [9, 1]]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        weighed = [(1, ONE), (1, TWO), (2, THREE)]
        close(mean(*(weighed[at] for at in order)), torch.tensor(wanted).double(), 1e-6)


def test_a_client_of_low_rank_changes_no_row_that_it_does_not_own():
    without, with_it = mean((1, TWO), (1, THREE)), mean((1, TWO), (5, ONE), (1, THREE))
    assert torch.equal(without[1:], with_it[1:])
    assert not torch.equal(without[0], with_it[0])


def test_to_leave_missing_rows_out_is_to_fill_them_with_the_owners_mean():
    filled = torch.cat([ONE, TWO[1:]])  # one level above: its only owner's row
    close(mean((1, ONE), (3, TWO)), (1 * filled + 3 * TWO).double() / 4, 1e-6)


def test_of_equal_ranks_the_owners_mean_is_the_weighted_mean():
    close(mean((1, TWO), (3, THREE[:2])), (TWO.double() + 3 * THREE[:2].double()) / 4)
