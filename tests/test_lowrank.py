"""The written backward pass against autograd through a formula that joins nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from fedalt.adapters.lowrank import Combination, add_low_rank
from fedalt.adapters.plan import Layout, Router

TOKENS, D_IN, D_OUT = 4, 5, 3
# The slot of each row of a router, by number of slots and layout; its own slot is slot 1.
MAPS: dict[tuple[int, Layout], list[int]] = {
    (2, "code"): [0, 1, 1],
    (3, "paper"): [1, 1, 1, 0, 2],
    (3, "code"): [0, 1, 2, 1, 1],
}
LAYOUTS: tuple[Layout, ...] = ("paper", "code")
ROUTERS = {
    f"router, {layout}, {'' if renormalise else 'not '}renormalised": Combination(
        (2, 1, 3), (1.5, 0.5, 2.0), None, Router(1, layout, renormalise)
    )
    for layout in LAYOUTS
    for renormalise in (True, False)
}
PLANS = {
    "one slot": Combination((2,), (1.5,), (1.0,)),
    "sum of two": Combination((2, 3), (1.5, 0.5), (0.25, 2.0)),
    "sum of three": Combination((2, 1, 3), (1.5, 0.5, 2.0), (1.0, -1.0, 0.3)),
    "mixer of two": Combination((2, 3), (1.5, 0.5), None),
    "mixer of three": Combination((2, 1, 3), (1.5, 0.5, 2.0), None),
    **ROUTERS,
}
TWO = PLANS["mixer of two"]
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
with_and_without_dropout = pytest.mark.parametrize("p", [0.0, 0.5], ids=["undropped", "dropped"])


@dataclass(frozen=True)
class Site:
    """Everything a site computes with; `clients` is the length of the first axis."""

    y: Tensor
    x: Tensor
    keep: Tensor | None
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    g: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        """y, x, and the factors in the order of `add_low_rank`."""
        return [self.y, self.x, *self.factors]

    @property
    def factors(self) -> list[Tensor]:
        return [*self.a, *self.b, *([] if self.g is None else [self.g])]

    def client(self, index: int) -> "Site":
        """One client's part, as leaves of their own that keep the axis."""

        def part(tensor: Tensor) -> Tensor:
            return tensor.detach()[index : index + 1].clone().requires_grad_(tensor.requires_grad)

        return Site(
            part(self.y),
            part(self.x),
            None if self.keep is None else part(self.keep),
            tuple(map(part, self.a)),
            tuple(map(part, self.b)),
            None if self.g is None else part(self.g),
        )


def site_for(plan: Combination, *, clients: int = 1, p: float = 0.0, tokens: int = TOKENS) -> Site:
    random = torch.Generator().manual_seed(clients)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=random, dtype=torch.float64)
        return values.requires_grad_()

    keep = None
    if p:
        drawn = torch.rand(clients, tokens, D_IN, generator=random, dtype=torch.float64)
        keep = (drawn >= p).double() / (1 - p)
        assert 0 < keep.count_nonzero() < keep.numel()
    rows = 2 * len(plan.ranks) - 1 if plan.router else len(plan.ranks)
    return Site(
        leaf(clients, tokens, D_OUT),
        leaf(clients, tokens, D_IN),
        keep,
        tuple(leaf(clients, rank, D_IN) for rank in plan.ranks),
        tuple(leaf(clients, D_OUT, rank) for rank in plan.ranks),
        None if plan.weights else leaf(clients, rows, D_IN),
    )


def ours(site: Site, plan: Combination) -> Tensor:
    return add_low_rank(site.y, site.x, site.keep, plan, (site.a, site.b, site.g))


def formula(site: Site, plan: Combination) -> Tensor:
    """Add s_i w_i B_i A_i drop(x) to y, client by client and token by token."""
    clients = []
    for client, rows in enumerate(site.x):
        tokens = []
        for token, x in enumerate(rows):
            dropped = x if site.keep is None else x * site.keep[client, token]
            if site.g is None:
                assert plan.weights is not None
                weights: Sequence[float | Tensor] = plan.weights
            else:
                exponents = [(row @ x).exp() for row in site.g[client]]
                weights = [exponent / sum(exponents) for exponent in exponents]
                if plan.router:
                    weights = routed(weights, plan.router)
            out = site.y[client, token]
            for a, b, scaling, weight in zip(site.a, site.b, plan.scalings, weights, strict=True):
                out = out + scaling * weight * (b[client] @ (a[client] @ dropped))
            tokens.append(out)
        clients.append(torch.stack(tokens))
    return torch.stack(clients)


def routed(rows: list[Tensor], router: Router) -> list[Tensor]:
    """The weights of the slots from the rows' probabilities, of which the smallest do not count."""
    slots = (len(rows) + 1) // 2
    chosen = sorted(rows, key=lambda row: float(row.detach()))[slots - 1 :]
    whole = sum(chosen) if router.renormalise else 1
    weights = [torch.zeros((), dtype=torch.float64)] * slots
    for slot, row in zip(MAPS[slots, router.layout], rows, strict=True):
        if any(row is each for each in chosen):
            weights[slot] = weights[slot] + row / whole
    return weights


def some_loss(out: Tensor) -> Tensor:
    """Not linear in the output, and different for every element of it."""
    weights = torch.arange(1, out[0].numel() + 1, dtype=out.dtype).reshape(out.shape[1:])
    return (out.tanh() * weights).sum() + (out**2).sum()


def assert_close(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@each_plan
@with_and_without_dropout
@pytest.mark.parametrize("clients", [1, 3])
def test_output_and_all_gradients_equal_the_formula(
    plan: Combination, p: float, clients: int
) -> None:
    site = site_for(plan, clients=clients, p=p)
    got, wanted = ours(site, plan), formula(site, plan)
    assert_close([got], [wanted])
    assert_close(
        torch.autograd.grad(some_loss(got), site.inputs),
        torch.autograd.grad(some_loss(wanted), site.inputs),
    )


@each_plan
@with_and_without_dropout
def test_five_clients_in_one_pass_equal_each_alone(plan: Combination, p: float) -> None:
    together = site_for(plan, clients=5, p=p)
    out = ours(together, plan)
    gradients = torch.autograd.grad(some_loss(out), together.inputs)
    for client in range(5):
        alone = together.client(client)
        out_alone = ours(alone, plan)
        assert_close([out[client : client + 1]], [out_alone])
        gradients_alone = torch.autograd.grad(some_loss(out_alone), alone.inputs)
        assert_close([part[client : client + 1] for part in gradients], gradients_alone)


@each_plan
@with_and_without_dropout
def test_first_and_second_derivatives_equal_finite_differences(plan: Combination, p: float) -> None:
    site = site_for(plan, clients=2, p=p, tokens=2)
    slots = len(plan.ranks)

    def function(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        a, b, g = factors[:slots], factors[slots : 2 * slots], factors[2 * slots :]
        return add_low_rank(y, x, site.keep, plan, (a, b, g[0] if g else None))

    assert gradcheck(function, site.inputs)
    assert gradgradcheck(function, site.inputs, fast_mode=True)


@with_and_without_dropout
@pytest.mark.parametrize("plan", [TWO, *ROUTERS.values()], ids=["mixer", *ROUTERS])
def test_second_derivatives_equal_the_formula_with_frozen_slots(
    plan: Combination, p: float
) -> None:
    site = site_for(plan, clients=2, p=p)
    for frozen in (site.a[1], site.b[1]):
        frozen.requires_grad_(False)
    leaves = [tensor for tensor in site.inputs if tensor.requires_grad]

    def second(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(some_loss(out), leaves, create_graph=True)
        return torch.autograd.grad(torch.cat([part.flatten() ** 3 for part in first]).sum(), leaves)

    assert_close(second(ours(site, plan)), second(formula(site, plan)))


@pytest.mark.parametrize(
    "plan",
    [PLANS["sum of two"], TWO, Combination((2, 3), (1.5, 0.5), None, Router(1, "code", True))],
    ids=["sum", "mixer", "router"],
)
def test_every_choice_of_what_trains_gives_exactly_those_gradients(plan: Combination) -> None:
    reference = site_for(plan, clients=2, p=0.5)
    wanted = torch.autograd.grad(some_loss(formula(reference, plan)), reference.inputs)
    for choice in product([False, True], repeat=len(reference.inputs) - 1):
        if not any(choice):
            continue
        choice = (False, *choice)  # y: no base layer wants a gradient of its own
        site = site_for(plan, clients=2, p=0.5)
        for tensor, trains in zip(site.inputs, choice, strict=True):
            tensor.requires_grad_(trains)
        some_loss(ours(site, plan)).backward()
        for tensor, trains, gradient in zip(site.inputs, choice, wanted, strict=True):
            if trains:
                assert tensor.grad is not None
                assert_close([tensor.grad], [gradient])
            else:
                assert tensor.grad is None


def test_the_input_gradient_includes_the_path_through_frozen_slots() -> None:
    site = site_for(TWO, p=0.5)
    for frozen in (*site.a[1:], *site.b[1:]):
        frozen.requires_grad_(False)
    some_loss(ours(site, TWO)).backward()
    assert site.x.grad is not None

    step = 1e-5
    differences = torch.empty_like(site.x)
    with torch.no_grad():
        for index in range(site.x.numel()):
            ends = []
            for sign in (1, -1):
                site.x.view(-1)[index] += sign * step
                ends.append(some_loss(ours(site, TWO)))
                site.x.view(-1)[index] -= sign * step
            differences.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(site.x.grad, differences, rtol=1e-6, atol=1e-6)

    # What a detached rest of world would give: were it the same, this test could not fail.
    output = formula(site, TWO)
    individual_only = Site(site.y, site.x, site.keep, site.a, (site.b[0], site.b[1] * 0), site.g)
    detached = formula(individual_only, TWO)
    detached = detached + (output - detached).detach()
    (without_frozen,) = torch.autograd.grad(some_loss(detached), site.x)
    assert (without_frozen - site.x.grad).abs().max() > 0.1


@pytest.mark.parametrize(
    "plan",
    [PLANS["sum of three"], PLANS["mixer of three"], *ROUTERS.values()],
    ids=["sum", "mixer", *ROUTERS],
)
@pytest.mark.parametrize("frozen", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("mixer_trains", [True, False])
def test_backward_multiplies_out_no_weight_gradient_of_what_is_frozen(
    plan: Combination, frozen: tuple[int, ...], mixer_trains: bool
) -> None:
    site = site_for(plan, clients=2, p=0.5)
    for slot in frozen:
        site.a[slot].requires_grad_(False)
        site.b[slot].requires_grad_(False)
    if site.g is not None:
        site.g.requires_grad_(mixer_trains)
    out = ours(site, plan)
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.ones_like(out))
    # Of the matmuls over all ranks, h is recomputed, and gradients go through B and through A.
    width = sum(plan.ranks)
    trained = sum(rank for slot, rank in enumerate(plan.ranks) if slot not in frozen)
    per_token = width * D_IN + width * D_OUT + width * D_IN + trained * (D_IN + D_OUT)
    if site.g is not None:  # its logits again, their gradient's way to x, and G's own gradient
        per_token += (2 + mixer_trains) * site.g.shape[1] * D_IN
    if plan.router:  # from rows to slots, and back
        per_token += 2 * 5 * 3
    assert counter.get_total_flops() == 2 * 2 * TOKENS * per_token


def test_mixer_logits_see_the_undropped_input() -> None:
    site = site_for(TWO, p=0.5)
    everything_dropped = Site(site.y, site.x, torch.zeros_like(site.x), site.a, site.b, site.g)
    assert torch.equal(ours(everything_dropped, TWO), site.y)
    # With A drop(x) held fixed, only the mixer can tell x from 2 x.
    keep = torch.zeros_like(site.x)
    keep[..., 0] = 1
    other = site.x.detach().clone()
    other[..., 1:] *= 2
    outs = [
        ours(Site(site.y, x, keep, site.a, site.b, g), TWO)
        for g in (site.g, torch.zeros(1, 2, D_IN, dtype=torch.float64))
        for x in (site.x, other)
    ]
    assert (outs[0] - outs[1]).abs().max() > 0.1
    assert torch.equal(outs[2], outs[3])


def test_one_vector_added_to_both_rows_of_the_mixer_changes_nothing() -> None:
    site = site_for(TWO, p=0.5)
    assert site.g is not None
    shifted = site.g + torch.randn(D_IN, dtype=torch.float64)
    moved = Site(site.y, site.x, site.keep, site.a, site.b, shifted)
    assert_close([ours(moved, TWO)], [ours(site, TWO)], 1e-12)


def whole_numbers(plan: Combination) -> Site:
    """Small whole numbers: products and sums of them have no rounding, whatever their order."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=random).float()

    return Site(
        draw(1, TOKENS, D_OUT),
        draw(1, TOKENS, D_IN),
        None,
        tuple(draw(1, rank, D_IN) for rank in plan.ranks),
        tuple(draw(1, D_OUT, rank) for rank in plan.ranks),
        torch.zeros(1, len(plan.ranks), D_IN),
    )


def test_a_mixer_of_zeros_weighs_both_slots_by_exactly_one_half() -> None:
    half = Combination(TWO.ranks, TWO.scalings, (0.5, 0.5))
    mixed = whole_numbers(TWO)
    fixed = Site(mixed.y, mixed.x, None, mixed.a, mixed.b, None)
    assert torch.equal(ours(mixed, TWO), ours(fixed, half))
    assert not torch.equal(ours(mixed, TWO), mixed.y)


@pytest.mark.parametrize(("chosen", "gap"), [(0, 60.0), (1, -60.0)], ids=["individual", "row"])
def test_a_large_gap_of_the_logits_reproduces_plain_lora(chosen: int, gap: float) -> None:
    mixed = site_for(TWO)
    x = mixed.x.detach().clone()
    x[..., 0] = 1  # so that G x is the gap, for every token
    g = torch.zeros(1, 2, D_IN, dtype=torch.float64)
    g[0, 0, 0] = gap
    plain = Combination((TWO.ranks[chosen],), (TWO.scalings[chosen],), (1.0,))
    alone = Site(mixed.y, x, None, (mixed.a[chosen],), (mixed.b[chosen],), None)
    both = Site(mixed.y, x, None, mixed.a, mixed.b, g)
    assert_close([ours(both, TWO)], [ours(alone, plain)])


def test_equal_slots_do_not_depend_on_the_mixer() -> None:
    equal = Combination((2, 2), (1.5, 1.5), None)
    site = site_for(equal, p=0.5)
    same = Site(site.y, site.x, site.keep, (site.a[0],) * 2, (site.b[0],) * 2, site.g)
    one = Combination((2,), (1.5,), (1.0,))
    alone = Site(site.y, site.x, site.keep, site.a[:1], site.b[:1], None)
    assert_close([ours(same, equal)], [ours(alone, one)])


@each_plan
def test_zero_b_leaves_the_base_output_bit_for_bit(plan: Combination) -> None:
    site = site_for(plan, p=0.5)
    zero = Site(site.y, site.x, site.keep, site.a, tuple(b * 0 for b in site.b), site.g)
    assert torch.equal(ours(zero, plan), site.y)


def test_a_slot_of_scaling_zero_keeps_the_mixer_gradient_finite() -> None:
    plan = Combination((2, 3), (0.0, 0.5), None)
    site = site_for(plan)
    assert_close(
        torch.autograd.grad(some_loss(ours(site, plan)), site.inputs),
        torch.autograd.grad(some_loss(formula(site, plan)), site.inputs),
    )


each_router = pytest.mark.parametrize("plan", ROUTERS.values(), ids=ROUTERS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
def test_the_own_slot_has_m_rows_and_every_other_one(layout: Layout) -> None:
    for slots in range(1, 7):
        for own in range(slots):
            rows = Router(own, layout, True).slot_map(slots)
            assert len(rows) == 2 * slots - 1
            for slot in range(slots):
                assert rows.count(slot) == (slots if slot == own else 1)
            assert all(own in chosen for chosen in combinations(rows, slots))
    assert [Router(1, layout, True).slot_map(3)] == [tuple(MAPS[3, layout])]


@pytest.mark.parametrize(
    ("renormalise", "wanted"), [(True, (0.597701, 0, 0.402299)), (False, (0.52, 0, 0.35))]
)
def test_a_routers_weights_are_those_computed_by_hand(
    renormalise: bool, wanted: tuple[float, ...]
) -> None:
    # Rows 1, 4 and 0 are the largest; rows 0 and 1 are the own slot's, row 4 is that of slot 2.
    logits = torch.tensor([0.12, 0.40, 0.05, 0.08, 0.35], dtype=torch.float64).log()[None, None]
    plan = Combination((1,) * 3, (1.0,) * 3, None, Router(0, "paper", renormalise))
    (found,) = plan.shares(logits, logits)[0]
    torch.testing.assert_close(found, found.new_tensor(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_both_layouts_are_one_function_of_permuted_rows(own: int, renormalise: bool) -> None:
    paper, code = (
        Combination((2, 1, 3), (1.5, 0.5, 2.0), None, Router(own, layout, renormalise))
        for layout in LAYOUTS
    )
    site = site_for(paper, clients=2)
    assert site.g is not None
    # Row 0 of the paper's is an own one, rows 3 and 4 are those of the others in their order.
    permuted = site.g[:, {0: [0, 3, 4, 1, 2], 1: [3, 0, 4, 1, 2], 2: [3, 4, 0, 1, 2]}[own]]
    other = Site(site.y, site.x, site.keep, site.a, site.b, permuted)
    assert_close([ours(other, code)], [ours(site, paper)])
    assert (ours(site, code) - ours(site, paper)).abs().max() > 0.1


@each_layout
def test_equal_slots_do_not_depend_on_the_router_but_for_what_is_not_chosen(layout: Layout) -> None:
    renormalised, plain = (
        Combination((2,) * 3, (1.5,) * 3, None, Router(2, layout, flag)) for flag in (True, False)
    )
    site = site_for(renormalised, p=0.5)
    assert site.g is not None
    same = Site(site.y, site.x, site.keep, (site.a[0],) * 3, (site.b[0],) * 3, site.g)
    alone = Site(site.y, site.x, site.keep, site.a[:1], site.b[:1], None)
    lora = ours(alone, Combination((2,), (1.5,), (1.0,)))
    assert_close([ours(same, renormalised)], [lora])
    mass = (site.x @ site.g.mT).softmax(-1).topk(3, -1).values.sum(-1, keepdim=True)
    assert mass.max() < 0.99
    assert_close([ours(same, plain)], [site.y + mass * (lora - site.y)])


@each_layout
@pytest.mark.parametrize("renormalise", [True, False])
def test_a_router_of_one_slot_is_plain_lora(layout: Layout, renormalise: bool) -> None:
    plan = Combination((2,), (1.5,), None, Router(0, layout, renormalise))
    site = site_for(plan, p=0.5)
    alone = Site(site.y, site.x, site.keep, site.a, site.b, None)
    assert_close([ours(site, plan)], [ours(alone, Combination((2,), (1.5,), (1.0,)))])
    (gradient,) = torch.autograd.grad(some_loss(ours(site, plan)), [site.g])
    assert_close([gradient], [torch.zeros_like(gradient)])


@each_router
def test_slots_that_no_token_chose_get_no_gradient(plan: Combination) -> None:
    assert plan.router is not None
    site = site_for(plan)
    x = site.x.detach().clone()
    x[..., 0] = 1  # so that the first column of G alone can say that the own rows win
    own = torch.tensor([slot == 1 for slot in MAPS[3, plan.router.layout]])
    g = torch.zeros(1, 5, D_IN, dtype=torch.float64)
    g[0, own, 0] = 1
    won = Site(site.y, x, None, site.a, site.b, g.requires_grad_())
    a, b = (torch.autograd.grad(some_loss(ours(won, plan)), each) for each in (won.a, won.b))
    assert [bool(part.any()) for part in a] == [False, True, False]
    assert [bool(part.any()) for part in b] == [False, True, False]
