"""What clients start from: the same for all, and independent of what else is drawn."""

import math

import pytest
import tiny
import torch

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import HEAD, MIXER, Mixer, Plan, Shape, Slot, single
from fedalt.core.tree import Name, Tree, equal, merge, move

SITES = {"first": Shape(32, 16), "second": Shape(32, 16), "third": Shape(100, 24)}
HEADS = {Name("score", HEAD, "weight"): (3, 32), Name("score", HEAD, "bias"): (3,)}
START = Initializer(SITES, HEADS, 5)
SLOT = Slot("shared", 4, 8.0)


def everything(init: Initializer) -> Tree:
    return merge(init.adapter(SLOT), init.mixer(2), init.head())


def test_every_draw_is_the_same_whatever_was_drawn_before() -> None:
    first = everything(START)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    START.adapter(SLOT, only_for="somebody")
    assert equal(everything(Initializer(dict(SITES), dict(HEADS), 5)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_other_values() -> None:
    other = everything(Initializer(SITES, HEADS, 6))
    for name, tensor in everything(START).items():
        drawn = name.factor in ("A", "G", "weight")
        assert torch.equal(tensor, other[name]) != drawn


def test_one_more_site_or_head_changes_no_other() -> None:
    more = Initializer(
        {"zeroth": Shape(8, 8), **SITES}, {Name("dense", HEAD, "weight"): (32, 32), **HEADS}, 5
    )
    grown = everything(more)
    assert equal({name: grown[name] for name in everything(START)}, everything(START))
    assert len(grown) == len(everything(START)) + 4


def test_sites_and_purposes_draw_different_values() -> None:
    adapter, mixer = START.adapter(Slot("shared", 2, 8.0)), START.mixer(2)
    assert not torch.equal(
        adapter[Name("first", "shared", "A")], adapter[Name("second", "shared", "A")]
    )
    assert not torch.equal(adapter[Name("first", "shared", "A")], mixer[Name("first", MIXER, "G")])


def test_all_slots_and_methods_start_from_the_same_a() -> None:
    other = START.adapter(Slot("individual", 4, 1.0))
    assert equal(move(other, "individual", "shared"), START.adapter(SLOT))


def test_a_lower_rank_draws_the_first_rows_of_a_higher_one() -> None:
    low, high = START.adapter(SLOT), START.adapter(Slot("shared", 8, 8.0))
    for name, tensor in low.items():
        if name.factor == "A":
            assert torch.equal(tensor, high[name][:4])
    for name, tensor in START.mixer(2).items():
        assert torch.equal(tensor, START.mixer(3)[name][:2])


@pytest.mark.parametrize("d_in", [1, 32, 1000])
def test_a_and_g_fill_the_range_of_one_over_the_root_of_their_inputs(d_in: int) -> None:
    init = Initializer({"only": Shape(d_in, 3)}, {}, 5)
    bound = 1 / math.sqrt(d_in)
    rows = max(2, 4000 // d_in)
    for tensor in (
        init.adapter(Slot("shared", rows, 8.0))[Name("only", "shared", "A")],
        init.mixer(rows)[Name("only", MIXER, "G")],
    ):
        assert tensor.shape == (rows, d_in)
        assert tensor.dtype == torch.float32
        assert tensor.abs().max() <= bound * (1 + 1e-6)
        assert tensor.abs().max() > 0.98 * bound
        assert tensor.mean().item() == pytest.approx(0, abs=0.05 * bound)
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_b_and_biases_are_zero_and_head_weights_small() -> None:
    for name, tensor in everything(START).items():
        if name.factor in ("B", "bias"):
            assert not tensor.any()
    weight = Initializer({}, {Name("score", HEAD, "weight"): (100, 32)}, 5).head()
    assert weight[Name("score", HEAD, "weight")].std().item() == pytest.approx(0.02, rel=0.05)


def test_a_mixer_may_start_at_zero() -> None:
    assert all(not tensor.any() for tensor in START.mixer(2, "zeros").values())
    assert START.mixer(2, "zeros").keys() == START.mixer(2).keys()


def test_a_client_may_draw_an_a_of_its_own() -> None:
    common = START.adapter(SLOT)
    own, others = START.adapter(SLOT, only_for="a"), START.adapter(SLOT, only_for="b")
    assert equal(own, START.adapter(SLOT, only_for="a"))
    for name in common:
        drawn = name.factor == "A"
        assert torch.equal(own[name], common[name]) != drawn
        assert torch.equal(own[name], others[name]) != drawn


@pytest.mark.parametrize("build", tiny.ALL.values(), ids=tiny.ALL)
def test_a_start_is_exactly_what_a_plan_needs_and_leaves_a_causal_base_as_it_is(
    build: tiny.Model,
) -> None:
    adapted = AdaptedModel(build())
    init = Initializer(adapted.sites, adapted.heads, 5)
    plan = Plan((SLOT, Slot("rest_of_world", 2, 8.0)), Mixer())
    tree = merge(*(init.adapter(slot) for slot in plan.slots), init.mixer(2), init.head())
    ids = tiny.tokens(2, 5)
    with torch.no_grad():
        base = adapted.model(ids).logits
        with adapted.bound(plan, tree) as model:
            bound = model(ids).logits
    assert torch.equal(bound, base) == (not adapted.heads)
    with adapted.bound(single(SLOT), merge(init.adapter(SLOT), init.head())):
        pass
