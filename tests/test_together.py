"""Packed texts and clients that train together: the same numbers as each alone."""

from dataclasses import replace

import pytest
import torch
from bases import base_of, example, random_serving_tree, start_of, train
from test_contract import ROWS
from test_layer import quantised
from tiny import CAUSAL, bert_classifier

from fedalt.adapters.packing import Packs, packed, packing_of
from fedalt.adapters.plan import Mixer, Plan, Router, Slot, Sum, names_of
from fedalt.core import tree as trees
from fedalt.evaluation.group import Group
from fedalt.evaluation.likelihood import _sums
from fedalt.methods.contract import Serving
from fedalt.training.batches import collate
from fedalt.training.flat import Flat
from fedalt.training.group import Share, Training
from fedalt.training.loop import fit_together, train_together
from fedalt.training.loss import client_means, token_losses
from fedalt.training.orders import Fit, Moments

PACKS = [name for name in CAUSAL if name != "bloom"]
SLOTS = (Slot("own", 2, 4.0), Slot("rest", 3, 6.0))
PLANS = {
    "sum": Plan(SLOTS, Sum((1.0, 0.5)), 0.2),
    "mixer": Plan(SLOTS, Mixer(), 0.2),
    "router": Plan(SLOTS, Router(own=0, layout="paper", renormalise=False), 0.2),
}
DATA = {
    0: [example("ab c", "xy"), example("d", "z"), example("abcdef gh", "q"), example("e", "xxx")],
    1: [example("what", "no"), example("why then", "yes")],
    2: [example("a", "b"), example("bb b", "c"), example("c", "de"), example("dddd", "f"),
        example("ee", "g"), example("long enough a text", "h"), example("g", "ab")],
}  # fmt: skip


def losses_of(base, plan, tree, groups, *, pack, seeds=None):
    batch = collate(groups, base.pad_id, base.adapted.device, pack=pack)
    with base.adapted.bound(plan, tree, seeds, packing=batch.packing) as model:
        losses = client_means(token_losses(model, batch), batch, len(groups))
        losses.sum().backward()
    return losses.detach()


def leaves(tree):
    return {name: tensor.clone().requires_grad_() for name, tensor in tree.items()}


def test_a_packing_says_where_each_token_goes_and_comes_from():
    packing = packing_of([[2], [3, 1]], "cpu")
    assert packing.spans == (2, 4)
    assert packing.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    (rows,), (missing,) = packing.blocks, packing.missing
    assert rows.tolist() == [[2, 3, 4], [0, 1, 0], [5, 0, 0]]
    assert missing.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1]]
    row = torch.arange(6)
    assert torch.equal(row[rows].flatten()[packing.places], row)
    assert packing_of([[2, 1], [3]], "cpu").spans is None


@pytest.mark.parametrize("lengths", [[300, 80, 290, 90, 5], [7] * 50 + [400], [3]])
def test_texts_of_similar_length_stand_in_a_block(lengths):
    packing = packing_of([lengths], "cpu")
    row = torch.arange(sum(lengths))
    blocks = [row[rows].flatten() for rows in packing.blocks]
    assert torch.equal(torch.cat(blocks)[packing.places], row)
    assert sum(len(block) for block in blocks) < 1.4 * sum(lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_who_packs_was_tried(name, dtype):
    base = base_of(CAUSAL[name]().to(dtype))
    assert (base.adapted.packs.longest > 0) == (name in PACKS)


def test_a_window_bounds_what_is_packed():
    assert base_of(CAUSAL["mistral"]()).adapted.packs.longest == 4096


def test_classifiers_are_not_packed():
    assert base_of(bert_classifier()).adapted.packs == Packs(0, "it classifies")


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", PACKS)
def test_packed_clients_have_the_losses_and_gradients_of_each_alone(name, targets, plan):
    base = base_of(CAUSAL[name](), targets)
    plan = Plan(plan.slots, plan.combine)
    each = [random_serving_tree(base, plan, seed) for seed in range(3)]
    stacked = leaves({n: torch.stack([tree[n] for tree in each]) for n in each[0]})
    together = losses_of(base, plan, stacked, list(DATA.values()), pack=True)
    for client, tree in enumerate(each):
        own = leaves(tree)
        alone = losses_of(base, plan, own, [DATA[client]], pack=False)
        torch.testing.assert_close(together[client], alone[0], rtol=1e-5, atol=1e-5)
        for n, tensor in own.items():
            torch.testing.assert_close(
                stacked[n].grad[client], tensor.grad, rtol=1e-4, atol=1e-5, msg=str(n)
            )


def test_equal_numbers_of_tokens_are_one_batched_product_and_the_same(monkeypatch):
    base = base_of()
    plan = PLANS["mixer"]
    groups = [[example("abc", "d")], [example("xyz", "w")]]
    each = [random_serving_tree(base, plan, seed) for seed in range(2)]
    stacked = leaves({n: torch.stack([tree[n] for tree in each]) for n in each[0]})
    assert collate(groups, base.pad_id, base.adapted.device, pack=True).packing.spans is None
    together = losses_of(base, plan, stacked, groups, pack=True, seeds=(5, 6))
    for client, tree in enumerate(each):
        alone = losses_of(
            base, plan, leaves(tree), [groups[client]], pack=True, seeds=(5 + client,)
        )
        torch.testing.assert_close(together[client], alone[0], rtol=1e-5, atol=1e-6)


def test_a_text_never_sees_the_one_before_it():
    base = base_of()
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    other = tokens.clone()
    other[0, 0] = 20
    packing = packing_of([[2, 3]], "cpu")
    with packed(packing), torch.no_grad():
        one, two = (
            base.adapted.model(ids, position_ids=packing.positions).logits
            for ids in (tokens, other)
        )
    assert torch.equal(one[0, 2:], two[0, 2:])
    assert not torch.equal(one[0, :2], two[0, :2])


def order_of(base, plan, seed, moments=None):
    tree = random_serving_tree(base, plan, seed)
    frozen = names_of(tree, "rest")
    return Fit(plan, tree, frozenset(tree) - frozen, moments=moments)


def shares_of(base, plan, moments=None):
    return [Share(order_of(base, plan, c, moments), DATA[c], seed=10 + c) for c in DATA]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_clients_that_train_together_take_the_steps_of_each_alone(name, plan, checkpointing):
    base = base_of(CAUSAL[name]())
    training = Training(
        lr=1e-2, batch_size=2, local_epochs=2, clip=0.3, gradient_checkpointing=checkpointing
    )
    shares = shares_of(base, plan, Moments())
    assert all(fit_together(base, shares[0], other) for other in shares)
    heard = []
    together = train_together(base, shares, training, lambda *what: heard.append(what[:3]))
    assert [found.steps for found in together] == [4, 2, 8]
    assert heard[-1] == (2, 8, 8)
    for share, found in zip(shares, together, strict=True):
        alone = train(base, share.order, share.examples, training, seed=share.seed)
        assert found.steps == alone.steps
        assert found.tokens == alone.tokens
        assert found.loss == pytest.approx(alone.loss, rel=1e-4)
        assert found.moments.steps == alone.moments.steps
        for n, tensor in alone.tree.items():
            # AdamW makes steps of size out of rounding: here a tenth of a step, in eight steps.
            torch.testing.assert_close(found.tree[n], tensor, rtol=1e-3, atol=1e-3, msg=str(n))
        assert trees.equal(trees.select(found.tree, "rest"), trees.select(share.order.tree, "rest"))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_clients_train_together_on_a_quantised_base(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = base_of(quantised(CAUSAL["llama"], tmp_path, **{bits: True}))
    assert base.adapted.packs.longest
    shares = shares_of(base, PLANS["mixer"])
    training = Training(lr=1e-2, batch_size=2)
    for share, found in zip(shares, train_together(base, shares, training), strict=True):
        alone = train(base, share.order, share.examples, training, seed=share.seed)
        assert found.loss == pytest.approx(alone.loss, rel=1e-3)
        for n, tensor in alone.tree.items():
            # In 8 bits inputs are rounded to float16 first; AdamW's first steps show that most.
            torch.testing.assert_close(found.tree[n], tensor, rtol=1e-3, atol=5e-3, msg=str(n))


def test_orders_that_differ_do_not_share_passes():
    base = base_of()
    one, other, *_ = shares_of(base, PLANS["sum"])
    assert fit_together(base, one, other)
    assert not fit_together(base, one, Share(order_of(base, PLANS["mixer"], 0), DATA[1], 0))
    assert not fit_together(base_of(CAUSAL["bloom"]()), one, other)
    for part in ({"penalty": lambda tree: 0.0}, {"compose": dict}, {"rate": 0.5}):
        order = replace(other.order, **part)
        assert not fit_together(base, one, Share(order, other.examples, 0))


@pytest.mark.parametrize("steps", [1, 5])
def test_the_flat_optimiser_is_adamw_with_clipping_for_every_client(steps):
    stream = torch.Generator().manual_seed(0)
    base = base_of()
    plan = PLANS["sum"]
    given = [random_serving_tree(base, plan, seed) for seed in range(3)]
    names = sorted(given[0])
    flat = Flat.of(given, names, [None] * 3)
    rates = [1e-2, 3e-3, 0.0]
    own = [leaves(tree) for tree in given]
    optimizers = [
        torch.optim.AdamW([tree[n] for n in names], lr=rate, weight_decay=0.1)
        for tree, rate in zip(own, rates, strict=True)
    ]
    for _ in range(steps):
        gradients = {n: torch.zeros_like(leaf) for n, leaf in flat.tree.items()}
        for client, (tree, optimizer) in enumerate(zip(own, optimizers, strict=True)):
            for n in names:
                gradient = torch.randn(tree[n].shape, generator=stream) * 10**client
                gradients[n][client] = gradient
                tree[n].grad = gradient
            torch.nn.utils.clip_grad_norm_([tree[n] for n in names], 1.0)
            optimizer.step()
        flat.descend(gradients, rates, 0.1, 1.0)
    for client, tree in enumerate(own):
        for n, found in flat.values(client).items():
            torch.testing.assert_close(found, tree[n].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=ROWS.keys())
def test_every_method_gives_the_same_states_together_as_one_by_one(row):
    from federation import MemoryStates, one_by_one, run_groups, trees_of
    from test_fedlease import grouped  # noqa: F401 - the warm-up is short there too

    method, base = ROWS[row], base_of()
    init = start_of(base)
    training = Training(lr=1e-2, batch_size=2)

    def one(client_id, number, order):
        return answers([(client_id, number, order)])[0]

    def answers(orders):
        from fedalt.training.orders import Embed, Fitted, Found, Search

        fits = [each for each in orders if isinstance(each[2], Fit)]
        if len(fits) < len(orders):
            return [
                Found(order.start, 0.0)
                if isinstance(order, Search)
                else torch.ones(order.examples, 6)
                if isinstance(order, Embed)
                else one(client_id, number, order)
                for client_id, number, order in orders
            ]
        shares = [Share(order, DATA["abc".index(c)], seed=n) for c, n, order in fits]
        if all(fit_together(base, shares[0], share) for share in shares):
            found = train_together(base, shares, training)
        else:
            found = [train_together(base, [share], training)[0] for share in shares]
        return [
            Fitted(each.tree, len(share.examples), each.moments)
            for each, share in zip(found, shares, strict=True)
        ]

    together, alone = MemoryStates(), MemoryStates()
    for _ in range(2):
        run_groups(method, init, together, ["abc"], answers)
        run_groups(method, init, alone, ["a", "b", "c"], one_by_one(one))
    for key, state in alone.items():
        left, right = trees_of(state), trees_of(together[key])
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            # Half a step: AdamW moves a number with hardly any gradient where rounding points.
            torch.testing.assert_close(right[name], tensor, rtol=1e-2, atol=5e-3, msg=str(name))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", PACKS)
def test_answers_behind_one_prompt_are_scored_as_each_alone(name, plan):
    base = base_of(CAUSAL[name](), "all-linear")
    serving = Serving(Plan(plan.slots, plan.combine), random_serving_tree(base, plan, 0))
    questions = [
        [example("what is it", answer) for answer in ("a", "bcd", "zz")],
        [example("a longer prompt than before", "yes")],
        [example("q", answer) for answer in ("", "no")],
    ]
    group = Group(base, [serving])
    packed_sums, counts = _sums(group, [questions], None, 2)
    packs = base.adapted.packs
    base.adapted.packs = Packs(0, "for comparison")
    padded_sums, padded_counts = _sums(group, [questions], None, 2)
    assert packs.longest > 0
    assert counts.tolist() == padded_counts.tolist()
    torch.testing.assert_close(packed_sums, padded_sums, rtol=1e-5, atol=1e-5)
