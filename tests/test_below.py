"""Blocks below the lowest adapted layer run once for each text."""

import pytest
import torch
from bases import base_of, example, random_serving_tree
from tiny import CAUSAL

from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import Mixer, Plan, Slot
from fedalt.training.group import Share, Training
from fedalt.training.loop import train_together
from fedalt.training.orders import Fit

PLAN = Plan((Slot("own", 2, 4.0), Slot("rest", 3, 6.0)), Mixer(), 0.2)
DATA = [
    [example("ab c", "xy"), example("d", "z"), example("abcdef gh", "q")],
    [example("what", "no"), example("why then", "yes"), example("d", "z")],
]
TEXTS = len({each.ids for data in DATA for each in data})
PACKS = [name for name in CAUSAL if name != "bloom"]
TRAINING = Training(lr=1e-2, batch_size=2, local_epochs=3)


def upper(name):
    """A base whose last block alone is adapted."""
    sites = list(AdaptedModel(CAUSAL[name]()).sites)
    numbers = {site: next(part for part in site.split(".") if part.isdecimal()) for site in sites}
    last = max(numbers.values(), key=int)
    assert last != "0"
    return base_of(CAUSAL[name](), [site for site in sites if numbers[site] == last])


def trained(base, training=TRAINING):
    trees = [random_serving_tree(base, PLAN, seed) for seed in (0, 1)]
    names = {name for name in trees[0] if name.slot != "rest"}
    shares = [
        Share(Fit(PLAN, tree, frozenset(names)), data, seed)
        for seed, (tree, data) in enumerate(zip(trees, DATA, strict=True))
    ]
    return [each.tree for each in train_together(base, shares, training)]


def counted(base):
    """How often the first block of a model has computed something."""
    calls = []
    modules = base.adapted.model.modules()
    blocks = next(each for each in modules if isinstance(each, torch.nn.ModuleList))
    next(blocks[0].children()).register_forward_hook(lambda *_: calls.append(1))
    return calls


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", PACKS)
def test_what_is_below_runs_once_for_each_text_and_changes_nothing(name):
    base, plain = upper(name), upper(name)
    plain.adapted.below = None
    calls = counted(base)
    assert_close(trained(base), trained(plain))
    assert len(calls) == TEXTS


def test_it_runs_again_where_memory_is_short(monkeypatch):
    plain = upper("llama")
    plain.adapted.below = None
    monkeypatch.setattr("fedalt.adapters.below._BUDGET", 0)
    base = upper("llama")
    found, expected = trained(base), trained(plain)
    assert all(torch.equal(one[n], other[n]) for one, other in zip(found, expected, strict=True)
               for n in one)  # fmt: skip


def test_it_works_where_activations_are_computed_again():
    base, plain = upper("llama"), upper("llama")
    again = Training(lr=1e-2, batch_size=2, local_epochs=3, gradient_checkpointing=True)
    assert_close(trained(base, again), trained(plain))


def test_a_text_is_the_same_whoever_stands_beside_it():
    ids = [each.ids for each in DATA[0]]
    together, alone = upper("llama").adapted.below, upper("llama").adapted.below
    whole = together.hidden(ids)
    parts = [alone.hidden([each]) for each in reversed(ids)]
    assert torch.equal(whole, torch.cat(parts[::-1], 1))


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_is_left_out_where_the_first_block_is_adapted(name):
    assert AdaptedModel(CAUSAL[name]()).below is None


def test_a_model_that_does_not_pack_is_left_alone():
    assert upper("bloom").adapted.below is None
