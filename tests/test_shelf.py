"""Rows with a client of their own compute what each client's own binding computes."""

import pytest
import torch
from bases import base_of, random_serving_tree
from tiny import tokens

from fedalt.adapters.plan import Mixer, Plan, Router, Similarity, Slot, Sum
from fedalt.adapters.shelf import SUM, Shelf, joint

TWO = (Slot("a", 2, 4.0), Slot("b", 3, 1.0))
THREE = (*TWO, Slot("c", 1, 2.0))
EQUAL = tuple(Slot(name, 2, 3.0) for name in "abc")
PLANS = {
    "sum": [Plan(TWO, Sum((0.5, 2.0)))] * 3,
    "sums of unequal ranks": [
        Plan((Slot("a", 2, 4.0),), Sum((1.0,))),
        Plan(THREE, Sum((1.0, -0.5, 2.0))),
        Plan(TWO, Sum((0.5, 2.0))),
    ],
    "mixer": [Plan(TWO, Mixer())] * 3,
    **{
        f"router, {layout}, own slots differ": [
            Plan(EQUAL, Router(own, layout, renormalise)) for own in (2, 0, 1)
        ]
        for layout, renormalise in (("paper", True), ("code", False))
    },
    "similarity": [Plan(TWO, Similarity(0.5, 0, 1))] * 3,
}
# Whose each row is: in order, doubled, with gaps, one alone, the base model among them.
ROWS = [[0, 1, 2], [2, 0, 2, 1, 2], [2, 2], [1], [0, None, 2, 0]]


@pytest.fixture(scope="module")
def base():
    return base_of(targets="all-linear")


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS)
@torch.no_grad()
def test_each_row_gets_what_its_client_computes_alone(base, plans, rows):
    trees = [random_serving_tree(base, plan, seed) for seed, plan in enumerate(plans)]
    factors = [
        joint(plan, tree, list(base.adapted.sites)) for plan, tree in zip(plans, trees, strict=True)
    ]
    assert len({each.kind for each in factors}) == 1
    shelf = Shelf(factors[0].kind, base.adapted.sites, torch.zeros(()))
    places = []
    for client in rows:
        own = None if client is None else factors[client]
        places.append(shelf.place(client, own, places))
    weighed = isinstance(plans[0].combine, Similarity)
    weights = torch.rand(len(rows), 2) if weighed else None
    ids = tokens(len(rows), 5)
    with base.adapted.pointed_at(shelf.rows(places, weights)) as model:
        together = model(ids).logits
    for row, client in enumerate(rows):
        if client is None:
            expected = base.adapted.model(ids[[row]]).logits
            assert torch.equal(base.adapted.model(ids).logits[row], together[row])
        else:
            shares = None if weights is None else weights[[row]]
            with base.adapted.bound(plans[client], trees[client], shares=shares) as model:
                expected = model(ids[[row]]).logits
        torch.testing.assert_close(together[[row]], expected)


@torch.no_grad()
def test_a_client_takes_a_place_that_no_row_uses_and_leaves_nothing_there(base):
    sites = base.adapted.sites
    plans = [Plan(THREE, Sum((1.0, 1.0, 1.0))), Plan((Slot("a", 1, 1.0),), Sum((1.0,)))]
    factors = [
        joint(plan, random_serving_tree(base, plan, seed), list(sites))
        for seed, plan in enumerate(plans)
    ]
    shelf = Shelf(SUM, sites, torch.zeros(()))
    assert shelf.place("big", factors[0], ()) == 0
    assert shelf.place("small", factors[1], (0,)) == 1
    assert shelf.place("big", factors[0], (1,)) == 0
    assert shelf.place("small again", factors[1], (1,)) == 0
    assert shelf.place("base", None, (0, 1)) == 2
    site = next(iter(sites))
    both = shelf.joined(site, slice(0, 2), torch.float32)
    assert torch.equal(both.b[0], both.b[1])
    assert torch.equal(both.ag[0], both.ag[1])
    assert not shelf.joined(site, slice(2, 3), torch.float32).b.any()
