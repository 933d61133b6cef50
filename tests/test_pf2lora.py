"""The oracles of PF2LoRA: the true hypergradient, two levels, and what stays with a client."""

import pytest
import torch
from bases import base_of, example, start_of, train
from federation import SITES, START, pull, run_one, served, simulate
from tiny import gpt2, llama

from fedalt.adapters.plan import HEAD, Plan, Slot, Sum, names_of
from fedalt.core import tree as trees
from fedalt.core.tree import Name
from fedalt.methods.bilevel import Unrolled
from fedalt.methods.fedit import FedIT
from fedalt.methods.lora import Lora
from fedalt.methods.pf2lora import INDIVIDUAL, SHARED, PF2LoRA
from fedalt.training.group import Training
from fedalt.training.orders import Fit

LORA = Lora(rank=3, alpha=6, dropout=0.0)
METHOD = PF2LoRA(lora=LORA, client_rank=1)
PLAN = Plan((Slot(SHARED, 3, 6.0), Slot(INDIVIDUAL, 1, 2.0)), Sum((1.0, 1.0)))
EXAMPLES = [example("ab c", "xy"), example("dd", "z"), example("abc", "q"), example("e f", "xx")]


def toy(seed: int = 0) -> tuple[trees.Tree, object]:
    """Two levels in float64, and a loss that is far from quadratic in both together."""
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    tree = {
        Name("s", SHARED, "A"): draw(3, 4),
        Name("s", SHARED, "B"): draw(5, 3),
        Name("s", INDIVIDUAL, "A"): draw(2, 4),
        Name("s", INDIVIDUAL, "B"): draw(5, 2),
    }
    inputs, targets = [draw(6, 4), draw(6, 4)], [draw(6, 5), draw(6, 5)]

    def loss(tree, which):
        weight = sum(
            tree[Name("s", slot, "B")] @ tree[Name("s", slot, "A")] for slot in (SHARED, INDIVIDUAL)
        )
        return (torch.tanh(inputs[which] @ weight.T) - targets[which]).square().mean()

    return {name: tensor.requires_grad_() for name, tensor in tree.items()}, loss


def after_one_lower_step(tree, loss, rate):
    """phi(x) = f(x, y - rate grad_y f(x, y)), as a number."""
    lower = sorted(name for name in tree if name.slot == INDIVIDUAL)
    slopes = torch.autograd.grad(loss(tree, 0), [tree[name] for name in lower])
    moved = {name: tree[name] - rate * slope for name, slope in zip(lower, slopes, strict=True)}
    return float(loss({**tree, **moved}, 1).detach())


@pytest.mark.parametrize(("gradient", "tolerance"), [("exact", 1e-8), ("finite_difference", 1e-3)])
def test_the_hypergradient_is_that_of_the_loss_after_a_lower_step(gradient, tolerance):
    tree, loss = toy()
    stepped = Unrolled(INDIVIDUAL, 0.3, gradient)(tree, sorted(tree), loss)
    for name, found in stepped.gradients.items():
        for at in range(found.numel()):
            with torch.no_grad():
                nudge = torch.zeros_like(tree[name]).view(-1)
                nudge[at] = 1e-6
                nudge = nudge.view_as(tree[name])
            ends = [
                after_one_lower_step(
                    {**tree, name: (tree[name] + sign * nudge).detach().requires_grad_()}, loss, 0.3
                )
                for sign in (1, -1)
            ]
            assert abs(float(found.view(-1)[at]) - (ends[0] - ends[1]) / 2e-6) < tolerance


def test_the_first_order_variant_leaves_something_out():
    tree, loss = toy()
    exact, first = (
        Unrolled(INDIVIDUAL, 0.3, kind)(tree, sorted(tree), loss)
        for kind in ("exact", "first_order")
    )
    assert trees.equal(exact.moved, first.moved)
    gaps = [(exact.gradients[name] - first.gradients[name]).abs().max() for name in exact.gradients]
    assert max(gaps) > 1e-3


def test_the_lower_level_takes_a_plain_step_on_its_own_batch():
    tree, loss = toy()
    stepped = Unrolled(INDIVIDUAL, 0.3, "exact")(tree, sorted(tree), loss)
    assert {name.slot for name in stepped.moved} == {INDIVIDUAL}
    for name, moved in stepped.moved.items():
        (slope,) = torch.autograd.grad(loss(tree, 0), [tree[name]])
        torch.testing.assert_close(moved, tree[name] - 0.3 * slope)


@pytest.mark.parametrize("gradient", ["exact", "finite_difference", "first_order"])
def test_what_the_lower_level_does_is_the_same_whatever_alpha_is(gradient):
    # A layer whose individual adapter is scaled by s, and D / s in the place of D, is one layer.
    def at(scaling):
        tree, loss = toy()
        name = Name("s", INDIVIDUAL, "B")
        tree[name] = (tree[name] / scaling).detach().requires_grad_()

        def scaled(tree, which):
            return loss({**tree, name: tree[name] * scaling}, which)

        stepped = Unrolled(INDIVIDUAL, 0.3, gradient, scaling)(tree, sorted(tree), scaled)
        return {**stepped.moved, name: stepped.moved[name] * scaling}, stepped.gradients

    (moved, upper), (again, once_more) = at(1.0), at(16.0)
    for name, tensor in moved.items():
        torch.testing.assert_close(again[name], tensor)
    tolerance = 1e-3 if gradient == "finite_difference" else 1e-9
    for name, tensor in upper.items():
        torch.testing.assert_close(once_more[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize("alpha", [6.0, 32.0, 128.0])
def test_a_clients_first_lower_step_moves_its_model_alike_for_every_alpha(alpha):
    base = base_of()

    def moved(alpha):
        method = PF2LoRA(lora=Lora(rank=3, alpha=alpha, dropout=0.0), client_rank=1)
        message = method.broadcast(method.init_server(start_of(base)), "a")
        order = next(method.local(method.init_client(start_of(base), "a"), message))
        tree = train(base, order, EXAMPLES[:2], Training(batch_size=2), seed=3).tree
        scaling = order.plan.slots[1].scaling
        return {
            site: scaling * tree[Name(site, INDIVIDUAL, "B")] @ tree[Name(site, INDIVIDUAL, "A")]
            for site in base.adapted.sites
        }

    expected, found = moved(3.0), moved(alpha)
    assert all(tensor.abs().max() > 1e-4 for tensor in expected.values())
    for site, tensor in expected.items():
        torch.testing.assert_close(found[site], tensor, rtol=1e-4, atol=1e-7)


def fit(base, gradient="exact", rate=0.1, tree=None, **settings):
    method = PF2LoRA(lora=LORA, client_rank=1, inner_lr=rate, hypergradient=gradient)
    init = start_of(base)
    message = method.broadcast(method.init_server(init), "a")
    order = next(method.local(method.init_client(init, "a"), message))
    training = Training(lr=1e-2, batch_size=2, weight_decay=0.0, **settings)
    return train(base, order, EXAMPLES, training, seed=3).tree, order


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("gradient", ["exact", "finite_difference", "first_order"])
def test_real_attention_layers_can_be_trained_on_both_levels(model, gradient):
    base = base_of(model())
    after, order = fit(base, gradient, local_epochs=4)
    moved = {n.slot: 0.0 for n in after}
    for name, tensor in after.items():
        moved[name.slot] += float((tensor - order.tree[name]).abs().sum())
    assert moved[SHARED] > 0.1
    assert moved[INDIVIDUAL] > 1e-4


def test_the_difference_of_first_derivatives_is_close_to_the_second_on_a_real_model():
    base = base_of()
    tree = {
        name: 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(at))
        for at, (name, shape) in enumerate(PLAN.shapes(base.adapted.sites).items())
    }
    found = {}

    class Watched(Unrolled):
        def __call__(self, tree, names, loss):
            stepped = super().__call__(tree, names, loss)
            found.setdefault(self.gradient, stepped.gradients)
            return stepped

    for gradient in ("exact", "finite_difference", "first_order"):
        order = Fit(PLAN, tree, frozenset(tree), step=Watched(INDIVIDUAL, 1.0, gradient))
        train(base, order, EXAMPLES, Training(batch_size=2), seed=0)

    def gap(gradient):
        others = found[gradient]
        return sum(float((found["exact"][name] - others[name]).norm()) for name in others)

    assert gap("finite_difference") < 0.05 * gap("first_order")


def test_dropout_masks_are_the_same_in_every_look_at_a_batch():
    base = base_of()
    plan = Plan(PLAN.slots, PLAN.combine, dropout=0.5)
    tree = {
        name: 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(at))
        for at, (name, shape) in enumerate(plan.shapes(base.adapted.sites).items())
    }
    looks = []

    class Looks(Unrolled):
        def __call__(self, tree, names, loss):
            looks.append([float(loss(tree, which)) for which in (0, 0, 1, 1)])
            return super().__call__(tree, names, loss)

    order = Fit(plan, tree, frozenset(tree), step=Looks(INDIVIDUAL, 0.1, "first_order"))
    train(base, order, EXAMPLES, Training(batch_size=2), seed=0)
    for own, again, following, once_more in looks:
        assert own == again
        assert following == once_more
        assert own != following


@pytest.mark.parametrize("gradient", ["exact", "finite_difference", "first_order"])
def test_with_a_lower_rate_of_zero_and_batches_that_are_alike_it_is_fedit(gradient):
    base = base_of()
    alike = [EXAMPLES[0]] * 4
    init = start_of(base)
    trees_after = []
    for method in (
        PF2LoRA(lora=LORA, client_rank=1, inner_lr=0.0, hypergradient=gradient),
        FedIT(lora=LORA),
    ):
        message = method.broadcast(method.init_server(init), "a")
        order = next(method.local(method.init_client(init, "a"), message))
        training = Training(lr=1e-2, batch_size=2, local_epochs=3)
        trees_after.append(train(base, order, alike, training, seed=3).tree)
    ours, theirs = trees_after
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    assert not any(tensor.any() for name, tensor in ours.items() if name[1:] == (INDIVIDUAL, "B"))


@pytest.mark.parametrize("seed", range(3))
def test_the_rank_of_the_sum_lies_between_the_difference_and_the_sum_of_the_ranks(seed):
    tree, _ = toy(seed)  # ranks 3 and 2
    total = sum(
        (tree[Name("s", slot, "B")] @ tree[Name("s", slot, "A")]).detach()
        for slot in (SHARED, INDIVIDUAL)
    )
    assert 1 <= int(torch.linalg.matrix_rank(total)) <= 5


def test_only_the_shared_adapter_is_sent_and_the_individual_one_never_changes_on_the_way():
    numbers = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())
    states, _ = simulate(METHOD, [("a", "b")])
    kept = {client: dict(states[f"clients/{client}"].kept) for client in "ab"}
    message = METHOD.broadcast(states["server"], "a")
    assert trees.numbers(message.tree) == numbers
    orders = []

    def watch(client_id, number, order):
        orders.append(order)
        return pull(client_id, number, order)

    _, upload = run_one(METHOD.local(states["clients/a"], message), watch, "a")
    assert trees.numbers(upload.tree) == numbers
    assert {name.slot for name in upload.tree} == {SHARED}
    assert trees.equal(trees.select(orders[0].tree, INDIVIDUAL, HEAD), kept["a"])
    serving = served(METHOD, states, "b")["b"]
    assert trees.equal(trees.select(serving.tree, INDIVIDUAL, HEAD), kept["b"])


def test_a_client_that_sits_out_keeps_its_individual_adapter():
    states, _ = simulate(METHOD, [("a", "b")])
    before = dict(states["clients/b"].kept)
    simulate(METHOD, [("a",), ("a",)], states)
    assert trees.equal(states["clients/b"].kept, before)


def test_the_individual_adapter_is_scaled_as_the_shared_one_is():
    order = next(
        METHOD.local(
            METHOD.init_client(START, "a"), METHOD.broadcast(METHOD.init_server(START), "a")
        )
    )
    assert [slot.scaling for slot in order.plan.slots] == [2.0, 2.0]
    assert [slot.rank for slot in order.plan.slots] == [3, 1]
    assert order.descending == names_of(order.tree, SHARED, HEAD)
