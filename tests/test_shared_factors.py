"""The oracles of FFA-LoRA, FedSA-LoRA and RoLoRA: what is exact, what is private, what is sent."""

import pytest
import torch
from bases import base_of, example, start_of, train
from federation import SITES, START, pull, run_one, served, simulate

from fedalt.adapters.plan import HEAD
from fedalt.core import tree as trees
from fedalt.core.tree import Name, move
from fedalt.methods.fedit import FedIT
from fedalt.methods.local import INDIVIDUAL, LocalOnly
from fedalt.methods.lora import Lora
from fedalt.methods.shared_factors import SHARED, SharedFactors
from fedalt.training.group import Training
from fedalt.training.orders import Fitted

LORA = Lora(rank=2, alpha=4, dropout=0.0)
FFA = SharedFactors(variant="ffa_lora", lora=LORA)
FEDSA = SharedFactors(variant="fedsa_lora", lora=LORA)
ROLORA = SharedFactors(variant="rolora", lora=LORA)
P_A = sum(LORA.rank * d_in for d_in, _ in SITES.values())
P_B = sum(LORA.rank * d_out for _, d_out in SITES.values())
SITE = "block.0.q"
A, B = Name(SITE, SHARED, "A"), Name(SITE, SHARED, "B")


class Watch:
    """Carries orders out as `pull` does and keeps orders and answers, client by client."""

    def __init__(self):
        self.orders, self.answers = {}, {}

    def __call__(self, client_id, number, order):
        self.orders.setdefault(client_id, []).append(order)
        self.answers.setdefault(client_id, []).append(pull(client_id, number, order))
        return self.answers[client_id][-1]

    def trained(self, client_id, round_):
        order = self.orders[client_id][round_]
        return {name.factor for name in order.train if name.slot != HEAD}


def error_of_the_mean(method, rounds, clients="abc"):
    """How far the served product is from the mean of the clients' products, after each round."""
    errors, states = [], None
    for _ in range(rounds):
        watch = Watch()
        states, _ = simulate(method, [clients], states, train=watch)
        products = [(t[0].tree[B].double() @ t[0].tree[A].double()) for t in watch.answers.values()]
        tree = served(method, states, clients)[clients[0]].tree
        difference = tree[B].double() @ tree[A].double() - sum(products) / len(products)
        errors.append(float(difference.abs().max()))
    return errors


@pytest.mark.parametrize("method", [FFA, ROLORA], ids=["ffa", "rolora"])
def test_the_mean_of_one_factor_is_the_mean_of_the_products(method):
    assert max(error_of_the_mean(method, 4)) < 1e-6


def test_the_mean_of_both_factors_is_not():
    assert min(error_of_the_mean(FedIT(lora=LORA), 4)) > 1e-3


def test_ffa_lets_a_as_it_was_drawn_on_all_clients_and_never_sends_it():
    watch = Watch()
    states, _ = simulate(FFA, [("a", "b", "c"), ("a",), ("a", "b", "c")], train=watch)
    drawn = START.adapter(LORA.slot(SHARED))[A]
    for client in "abc":
        assert all(torch.equal(order.tree[A], drawn) for order in watch.orders[client])
        assert watch.trained(client, -1) == {"B"}
        assert torch.equal(served(FFA, states, client)[client].tree[A], drawn)
    assert {name.factor for name in states["server"].factors} == {"B"}


def test_fedsa_keeps_every_b_with_its_client_and_gives_all_the_same_a():
    watch = Watch()
    states, _ = simulate(FEDSA, [("a", "b", "c"), ("a", "c"), ("a", "b", "c")], train=watch)
    for client in "abc":
        assert watch.trained(client, 0) == {"A", "B"}
        before, after = watch.answers[client][0].tree, watch.orders[client][1].tree
        assert torch.equal(before[B], after[B])
    servings = served(FEDSA, states, "abc")
    for client, serving in servings.items():
        assert torch.equal(serving.tree[A], servings["a"].tree[A])
        assert torch.equal(serving.tree[B], watch.answers[client][-1].tree[B])
    assert not torch.equal(servings["a"].tree[B], servings["b"].tree[B])
    assert {name.factor for name in states["server"].factors} == {"A"}


def test_no_fedsa_client_goes_on_from_the_b_of_another():
    # `pull` moves B regardless of A: each B must be what its client would have got alone.
    together, _ = simulate(FEDSA, [("a", "b", "c")] * 3)
    alone, _ = simulate(LocalOnly(lora=LORA), [("a", "b", "c")] * 3)
    for client in "abc":
        individual = move(alone[f"clients/{client}"].individual, INDIVIDUAL, SHARED)
        for name, tensor in together[f"clients/{client}"].kept.items():
            assert torch.equal(tensor, individual[name])


def test_a_fedsa_newcomer_gets_the_common_a_and_begins_with_b_zero():
    states, _ = simulate(FEDSA, [("a", "b")] * 2)
    tree = served(FEDSA, states, ["new"])["new"].tree
    assert torch.equal(tree[A], states["server"].factors[A])
    assert not tree[B].any()


def test_with_one_client_fedsa_is_local_training():
    fedsa, _ = simulate(FEDSA, [("a",)] * 3)
    alone, _ = simulate(LocalOnly(lora=LORA), [("a",)] * 3)
    ours, theirs = (
        served(m, s, "a")["a"].tree for m, s in ((FEDSA, fedsa), (LocalOnly(lora=LORA), alone))
    )
    for name, tensor in move(theirs, INDIVIDUAL, SHARED).items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_rolora_trains_b_in_even_rounds_and_a_in_odd_ones_while_the_other_is_the_same_everywhere():
    watch = Watch()
    simulate(ROLORA, [("a", "b", "c")] * 4, train=watch)
    for round_, (trains, frozen) in enumerate([("B", A), ("A", B), ("B", A), ("A", B)]):
        held = [watch.answers[client][round_].tree[frozen] for client in "abc"]
        assert all(torch.equal(tensor, held[0]) for tensor in held)
        assert [watch.trained(client, round_) for client in "abc"] == [{trains}] * 3
    begun = [watch.orders["a"][round_].tree for round_ in range(4)]
    assert not begun[0][B].any()
    assert not torch.equal(begun[1][B], begun[0][B])
    assert torch.equal(begun[1][A], begun[0][A])
    assert not torch.equal(begun[2][A], begun[1][A])


def test_a_rolora_client_that_sat_out_a_round_starts_where_all_others_do():
    watch = Watch()
    simulate(ROLORA, [("a", "b"), ("a",), ("a", "b")], train=watch)
    ours, theirs = watch.orders["b"][1], watch.orders["a"][2]
    assert trees.equal(trees.select(ours.tree, SHARED), trees.select(theirs.tree, SHARED))
    assert watch.trained("b", 1) == watch.trained("a", 2) == {"B"}


@pytest.mark.parametrize(
    ("method", "uploads", "download"),
    [(FFA, [P_B, P_B], P_B), (FEDSA, [P_A, P_A], P_A), (ROLORA, [P_B, P_A], P_A + P_B)],
    ids=["ffa", "fedsa", "rolora"],
)
def test_only_what_is_averaged_is_uploaded(method, uploads, download):
    states = None
    for numbers in uploads:
        message = method.broadcast(states["server"] if states else method.init_server(START), "a")
        _, upload = run_one(method.local(method.init_client(START, "a"), message), pull, "a")
        assert trees.numbers(upload.tree) == numbers
        assert trees.numbers(message.tree) == download
        states, _ = simulate(method, [("a",)], states)


def test_by_examples_a_client_counts_by_its_data():
    watch = Watch()
    method = SharedFactors(variant="ffa_lora", lora=LORA, weighting="examples")
    states, _ = simulate(method, [("a", "b")], train=watch)
    a, b = (watch.answers[client][0].tree[B] for client in "ab")  # 10 and 30 examples
    torch.testing.assert_close(states["server"].factors[B], a / 4 + b * 3 / 4, rtol=0, atol=1e-6)


def test_an_a_has_no_gradient_while_its_b_is_zero():
    # Why RoLoRA begins with B: AdamW without weight decay leaves what has no gradient.
    base = base_of()
    init = start_of(base)
    after = {}
    for variant in ("fedsa_lora", "rolora"):
        method = SharedFactors(variant=variant, lora=LORA)

        def one_step(client_id, number, order):
            training = Training(lr=1e-2, batch_size=2, weight_decay=0.0)
            return Fitted(train(base, order, [example("abc", "xy")], training, seed=0).tree, 1)

        server, client = method.init_server(init), method.init_client(init, "a")
        steps = method.local(client, method.broadcast(server, "a"))
        state, upload = run_one(steps, one_step, "a")
        after[variant] = {**state.kept, **upload.tree}
    drawn = init.adapter(LORA.slot(SHARED))
    for name, tensor in after["fedsa_lora"].items():
        assert torch.equal(tensor, drawn[name]) == (name.factor == "A")
    for name, tensor in after["rolora"].items():
        assert torch.equal(tensor, after["fedsa_lora"][name])


def test_fedsa_has_no_shared_part_of_its_own():
    states, _ = simulate(FEDSA, [("a", "b")])
    client, message = states["clients/a"], FEDSA.broadcast(states["server"], "a")
    assert FEDSA.shared(client, message) is None
