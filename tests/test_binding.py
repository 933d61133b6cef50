"""Binding a tree: what is refused, what is restored, heads, dropout masks, checkpointing."""

from collections.abc import Callable

import pytest
import tiny
import torch
from tiny import client_of, gradients, random_tree, stacked, tokens, trained
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from transformers import PreTrainedModel

from fedalt.adapters.binding import DropoutSeeds
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import (
    HEAD,
    MIXER,
    ROUTER,
    Mixer,
    Plan,
    Router,
    Shape,
    Slot,
    Sum,
    single,
)
from fedalt.core.tree import Name, Tree, select

Model = Callable[[], PreTrainedModel]
ONE = single(Slot("shared", 4, 8.0))
FEDALT = Plan((Slot("individual", 4, 8.0), Slot("rest_of_world", 2, 8.0)), Mixer())
DROPPED = Plan(FEDALT.slots, Mixer(), dropout=0.5)
SITE = "model.layers.1.self_attn.v_proj"
B = Name(SITE, "individual", "B")
each_classifier = pytest.mark.parametrize("build", tiny.CLASSIFIERS.values(), ids=tiny.CLASSIFIERS)


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return AdaptedModel(tiny.llama())


def logits_of(
    adapted: AdaptedModel, plan: Plan, tree: Tree, ids: Tensor, dropout: DropoutSeeds | None = None
) -> Tensor:
    with torch.no_grad(), adapted.bound(plan, tree, dropout) as model:
        logits: Tensor = model(ids).logits
    return logits


def assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# What is refused


def refusal(adapted: AdaptedModel, tree: Tree, dropout: DropoutSeeds | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as error, adapted.bound(FEDALT, tree, dropout):
        pass
    return str(error.value)


def test_a_missing_or_an_unknown_name_is_an_error(adapted: AdaptedModel) -> None:
    tree = random_tree(adapted, FEDALT)
    missing = {name: tensor for name, tensor in tree.items() if name != B}
    assert refusal(adapted, missing) == f"the tree to bind lacks 1 tensors, first {B}"
    other = Name("model.layers.9.self_attn.v_proj", "individual", "B")
    assert refusal(adapted, {**tree, other: tree[B]}).endswith(f"unexpected tensors, first {other}")
    assert "lacks" in refusal(adapted, select(tree, "individual", MIXER))


@pytest.mark.parametrize("wrong", [(16, 5), (4, 16), (16,), (), (3, 16, 5), (2, 3, 16, 4)], ids=str)
def test_a_wrong_shape_is_an_error(adapted: AdaptedModel, wrong: tuple[int, ...]) -> None:
    tree = {**random_tree(adapted, FEDALT), B: torch.zeros(wrong)}
    assert refusal(adapted, tree) == f"{B} is {wrong}, the plan needs (16, 4)"


def test_tensors_of_different_numbers_of_clients_are_an_error(adapted: AdaptedModel) -> None:
    tree = random_tree(adapted, FEDALT, clients=3)
    first = next(iter(tree))
    for clients, part in ((1, tree[B][0]), (2, tree[B][:2])):
        message = refusal(adapted, {**tree, B: part})
        assert message.startswith(f"{B} holds {clients} clients, but {first} holds 3")


@pytest.mark.parametrize(("clients", "seeds"), [(None, ()), (None, (1, 2)), (3, (1,))])
def test_a_wrong_number_of_dropout_seeds_is_an_error(
    adapted: AdaptedModel, clients: int | None, seeds: tuple[int, ...]
) -> None:
    message = refusal(adapted, random_tree(adapted, FEDALT, clients=clients), seeds)
    assert message == f"{len(seeds)} dropout seeds for {clients or 1} clients"


def test_a_batch_that_does_not_split_evenly_is_an_error(adapted: AdaptedModel) -> None:
    tree = random_tree(adapted, FEDALT, clients=2)
    with pytest.raises(ValueError, match=r"a batch of 3 rows does not split .* 2 clients"):
        logits_of(adapted, FEDALT, tree, tokens(3, 4))  # although 12 tokens would split


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slot("shared", 0, 8.0), "rank=0 of slot 'shared'"),
        (lambda: Slot(MIXER, 4, 8.0), "cannot be called 'mixer'"),
        (lambda: Slot(ROUTER, 4, 8.0), "cannot be called 'router'"),
        (lambda: Plan((Slot("a", 1, 1),), Router(1, "paper", True)), "own=1 of a router over 1"),
        (lambda: Slot(HEAD, 4, 8.0), "cannot be called 'head'"),
        (lambda: Plan((), Mixer()), "at least one slot"),
        (lambda: Plan((Slot("a", 1, 1), Slot("a", 2, 1)), Mixer()), "different names"),
        (lambda: Plan((Slot("a", 1, 1),), Sum((0.5, 0.5))), "2 weights for 1 slots"),
        (lambda: single(Slot("a", 1, 1), 1.0), "dropout=1.0"),
        (lambda: single(Slot("a", 1, 1), -0.1), "dropout=-0.1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plan_names_what_it_needs() -> None:
    assert FEDALT.shapes({"s": Shape(5, 3)}) == {
        Name("s", "individual", "A"): (4, 5),
        Name("s", "individual", "B"): (3, 4),
        Name("s", "rest_of_world", "A"): (2, 5),
        Name("s", "rest_of_world", "B"): (3, 2),
        Name("s", MIXER, "G"): (2, 5),
    }
    assert Slot("a", 4, 8.0).scaling == 2.0
    routed = Plan(FEDALT.slots, Router(0, "paper", True)).shapes({"s": Shape(5, 3)})
    assert routed[Name("s", ROUTER, "G")] == (3, 5)
    assert Name("s", MIXER, "G") not in routed


# What is restored


def test_nested_binds_restore_the_outer_tree(adapted: AdaptedModel) -> None:
    ids = tokens(2, 4)
    inner, outer = random_tree(adapted, ONE), random_tree(adapted, FEDALT)
    base = adapted.model(ids).logits
    with torch.no_grad(), adapted.bound(FEDALT, outer) as model:
        before = model(ids).logits
        with adapted.bound(ONE, inner):
            within = model(ids).logits
        after = model(ids).logits
        with pytest.raises(RuntimeError, match="inside"), adapted.bound(ONE, inner):
            raise RuntimeError("inside")
        with pytest.raises(ValueError, match="lacks"), adapted.bound(ONE, {}):
            pass
        after_an_error = model(ids).logits
    assert torch.equal(before, after)
    assert torch.equal(before, after_an_error)
    assert torch.equal(within, logits_of(adapted, ONE, inner, ids))
    assert not torch.allclose(before, within)
    assert torch.equal(adapted.model(ids).logits, base)


def test_a_bound_tree_is_used_and_not_copied(adapted: AdaptedModel) -> None:
    tree, ids = random_tree(adapted, ONE), tokens(2, 4)
    with torch.no_grad(), adapted.bound(ONE, tree) as model:
        first = model(ids).logits
        tree[B._replace(slot="shared")].mul_(2)  # as an optimiser would, in place
        assert not torch.allclose(model(ids).logits, first)


# Heads


@each_classifier
def test_the_head_is_bound_and_gets_gradients_of_its_own_client(build: Model) -> None:
    adapted = AdaptedModel(build())
    assert adapted.heads
    each = [random_tree(adapted, ONE, seed=seed) for seed in range(3)]
    tree, ids = trained(stacked(*each)), tokens(6, 5)
    with adapted.bound(ONE, tree) as model:
        logits = model(ids).logits
        grads = gradients(logits[2:4].tanh().sum(), tree)  # client 1's rows only
    alone = trained(each[1])
    with adapted.bound(ONE, alone) as model:
        logits_alone = model(ids[2:4]).logits
        grads_alone = gradients(logits_alone.tanh().sum(), alone)
    assert_near(logits[2:4], logits_alone)
    for name, gradient in grads.items():
        assert gradient[1].abs().max() > 0
        assert not gradient[0].any()
        assert not gradient[2].any()
        assert_near(gradient[1], grads_alone[name])


@each_classifier
def test_the_head_of_the_tree_replaces_the_head_of_the_base(build: Model) -> None:
    base, ids = build(), tokens(2, 5)
    adapted = AdaptedModel(build())
    tree = random_tree(adapted, ONE)
    for name in tree:
        if name.factor == "B":
            tree[name].zero_()
    assert not torch.allclose(logits_of(adapted, ONE, tree, ids), base(ids).logits, atol=0.1)
    with torch.no_grad():
        for name in adapted.heads:
            base.get_submodule(name.site).get_parameter(name.factor).copy_(tree[name])
        assert_near(logits_of(adapted, ONE, tree, ids), base(ids).logits)


@pytest.mark.parametrize("build", tiny.CAUSAL.values(), ids=tiny.CAUSAL)
def test_a_causal_model_has_no_head_of_its_own(build: Model) -> None:
    assert AdaptedModel(build()).heads == {}


# Dropout


def passing_on(plan: Plan) -> tuple[AdaptedModel, Tree]:
    """A model whose sites "q_proj" pass their (dropped) input on: W0 = 0, and B A = 1."""
    adapted = AdaptedModel(tiny.llama(), "q_proj")
    tree = random_tree(adapted, plan)
    for site in adapted.sites:
        adapted.model.get_submodule(site).weight.data.zero_()
        for slot in plan.slots:
            tree[Name(site, slot.name, "A")] = torch.eye(tiny.HIDDEN)
            tree[Name(site, slot.name, "B")] = torch.eye(tiny.HIDDEN)
    return adapted, tree


def through(
    adapted: AdaptedModel, plan: Plan, tree: Tree, x: Tensor, *seeds: int, layer: int = 0
) -> Tensor:
    """What a site alone makes of x."""
    site = adapted.model.get_submodule(list(adapted.sites)[layer])
    with adapted.bound(plan, tree, seeds or None):
        out: Tensor = site(x)
    return out


def two_slots(combine: Mixer | Sum, p: float) -> Plan:
    width = tiny.HIDDEN
    return Plan((Slot("a", width, width), Slot("b", width, width)), combine, p)


def test_dropout_zeroes_a_share_of_the_input_and_scales_up_the_rest() -> None:
    plan = single(Slot("shared", tiny.HIDDEN, tiny.HIDDEN), 0.25)
    adapted, tree = passing_on(plan)
    x = torch.ones(8, 20, tiny.HIDDEN)
    out = through(adapted, plan, tree, x, 7)
    assert out.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(through(adapted, plan, tree, x), x)  # no noise, no dropout
    assert torch.equal(through(adapted, plan, tree, x, 7), out)
    other = through(adapted, plan, tree, x, 8)
    assert ((out == 0) == (other == 0)).float().mean().item() == pytest.approx(0.625, abs=0.02)


def test_all_slots_share_one_mask() -> None:
    plan = two_slots(Sum((1.0, -1.0)), 0.5)
    adapted, tree = passing_on(plan)
    assert not through(adapted, plan, tree, torch.randn(2, 6, tiny.HIDDEN), 7).any()
    twice = two_slots(Sum((1.0, 1.0)), 0.5)
    out = through(adapted, twice, tree, torch.ones(2, 6, tiny.HIDDEN), 7)
    assert out.unique().tolist() == [0, 4]


def test_the_mixer_sees_the_undropped_input() -> None:
    plan = two_slots(Mixer(), 0.5)
    adapted, tree = passing_on(plan)
    site = next(iter(adapted.sites))
    tree[Name(site, "b", "B")].zero_()
    tree[Name(site, MIXER, "G")] = torch.zeros(2, tiny.HIDDEN)
    tree[Name(site, MIXER, "G")][0] = 1 / tiny.HIDDEN  # the mean of x, which dropout would change
    x = torch.full((2, 6, tiny.HIDDEN), 3.0)
    out = through(adapted, plan, tree, x, 7)
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, float(6 * torch.tensor(3.0).sigmoid())))


def test_sites_and_clients_have_masks_of_their_own() -> None:
    plan = single(Slot("shared", tiny.HIDDEN, tiny.HIDDEN), 0.5)
    adapted, tree = passing_on(plan)
    tree = stacked(tree, tree)
    x = torch.ones(2, 6, tiny.HIDDEN)
    out = through(adapted, plan, tree, x, 7, 8)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out, through(adapted, plan, tree, x, 7, 8, layer=1))
    same = through(adapted, plan, tree, x, 7, 7)
    assert torch.equal(same[0], same[1])


def test_grouping_clients_changes_no_mask(adapted: AdaptedModel) -> None:
    each = [random_tree(adapted, DROPPED, seed=seed) for seed in range(3)]
    ids = tokens(6, 5)
    together = trained(stacked(*each))
    with adapted.bound(DROPPED, together, (11, 12, 13)) as model:
        logits = model(ids).logits
        grads = gradients(logits.tanh().sum(), together)
    for client, seed in enumerate((11, 12, 13)):
        rows = slice(2 * client, 2 * client + 2)
        alone = trained(each[client])
        with adapted.bound(DROPPED, alone, (seed,)) as model:
            logits_alone = model(ids[rows]).logits
            grads_alone = gradients(logits_alone.tanh().sum(), alone)
        assert_near(logits[rows], logits_alone)
        for name, gradient in client_of(grads, client).items():
            assert_near(gradient, grads_alone[name])
        undropped = logits_of(adapted, DROPPED, each[client], ids[rows])
        assert (undropped - logits_alone).abs().max() > 0.1


def test_dropout_does_not_touch_the_global_generator(adapted: AdaptedModel) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    logits_of(adapted, DROPPED, random_tree(adapted, DROPPED), tokens(2, 4), (7,))
    assert torch.equal(torch.get_rng_state(), before)


# Gradient checkpointing


def checkpointed(build: Model) -> AdaptedModel:
    adapted = AdaptedModel(build())
    adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.model.train()  # without it, checkpointing does nothing
    return adapted


@pytest.mark.parametrize("build", tiny.ALL.values(), ids=tiny.ALL)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(build: Model) -> None:
    results = []
    forwards = []
    for adapted in (AdaptedModel(build()), checkpointed(build)):
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        adapted.model.get_submodule(next(iter(adapted.sites))).register_forward_hook(count)
        tree = trained(random_tree(adapted, DROPPED, clients=2))
        with adapted.bound(DROPPED, tree, (7, 8)) as model:
            loss = model(tokens(4, 5)).logits.tanh().sum()
            loss.backward()
        results.append((loss, {name: tensor.grad for name, tensor in tree.items()}))
        forwards.append(passes)
    (loss, grads), (loss_again, grads_again) = results
    assert forwards == [1, 2], "checkpointing did not run"
    assert torch.equal(loss, loss_again)
    for name, gradient in grads.items():
        again = grads_again[name]
        assert gradient is not None
        assert again is not None
        assert_near(again, gradient)


def test_a_checkpointed_backward_pass_after_the_binding_fails_loudly() -> None:
    adapted = checkpointed(tiny.llama)
    tree = trained(random_tree(adapted, FEDALT))
    with adapted.bound(FEDALT, tree) as model:
        loss = model(tokens(2, 5)).logits.sum()
    with pytest.raises(CheckpointError):
        loss.backward()
