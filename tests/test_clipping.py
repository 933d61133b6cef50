"""DP-SGD: per-text gradients equal autograd's, sums are clipped and noised as is said."""

import math
from dataclasses import replace

import pytest
import torch
from bases import base_of, example, random_serving_tree, train
from models_on_disk import SIZES
from tiny import CAUSAL, CLASSIFIERS, llama
from torch.nn import functional
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from fedalt.adapters.plan import HEAD, Mixer, Plan, Router, Slot, Sum, single
from fedalt.core import tree as trees
from fedalt.core.noise import Randomness
from fedalt.core.tree import Name
from fedalt.training.clipping import Clipping, clipped_sum, noised_mean, rate
from fedalt.training.group import Group, Share, Training
from fedalt.training.loop import train_together
from fedalt.training.orders import Fit

SLOTS = (Slot("own", 2, 4.0), Slot("rest", 3, 6.0))
PLANS = {
    "single": single(SLOTS[0]),
    "sum": Plan(SLOTS, Sum((1.0, 0.5))),
    "mixer": Plan(SLOTS, Mixer()),
    "router": Plan(SLOTS, Router(own=0, layout="paper", renormalise=False)),
    "renormalised router": Plan(SLOTS, Router(own=1, layout="code", renormalise=True)),
}
TEXTS = [
    example("ab c", "xy"),
    example("d", "z"),
    example("abcdef gh and more", "q and a"),
    example("e", "xxx"),
    example("why then", "yes"),
]
FULL = Training(lr=1e-2, batch_size=8, clip=1e9)
HUGE = 1e9


def double(tree):
    return trees.cast(tree, torch.float64)


def unclipped(seed=0):
    return Clipping(HUGE, 0.0, Randomness(seed))


def gradient_alone(base, plan, tree, text, names):
    """Autograd's, of one text in a row of its own, with torch's own cross entropy."""
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in tree.items()}
    with base.adapted.bound(plan, leaves) as model:
        if text.label is None:
            logits = model(input_ids=torch.tensor([text.ids])).logits[0]
            first = max(text.answer_start, 1)
            predicted, targets = logits[first - 1 : -1], torch.tensor(text.ids[first:])
        else:
            ids = torch.tensor([text.ids])
            predicted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            targets = torch.tensor([text.label])
        loss = functional.cross_entropy(predicted, targets)
        return dict(zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True))


def gradients_seen(monkeypatch, group):
    """What `text_gradients` gives within a step."""
    from fedalt.training import clipping as module

    seen = []
    plain = module.text_gradients
    monkeypatch.setattr(
        module, "text_gradients", lambda *args: seen.append(plain(*args)) or seen[-1]
    )
    group.step(0)
    return seen[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])  # packed twice, then padded
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gradients_of_texts_in_a_fused_pass_equal_autograd_text_by_text(monkeypatch, plan, name):
    base = base_of(CAUSAL[name]().double())
    of_clients = [double(random_serving_tree(base, plan, seed)) for seed in range(2)]
    texts = [TEXTS[:3], TEXTS[3:]]
    shares = [
        Share(Fit(plan, tree, frozenset(tree)), own, 0, unclipped())
        for tree, own in zip(of_clients, texts, strict=True)
    ]
    gradients, losses = gradients_seen(monkeypatch, Group.of(base, shares, FULL))
    assert len(losses) == 5
    number = 0
    for tree, own in zip(of_clients, texts, strict=True):
        for text in own:
            wanted = gradient_alone(base, plan, tree, text, list(gradients))
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient[number], wanted[key], rtol=1e-6, atol=1e-6)
            number += 1


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_has_gradients_of_each_text_too(monkeypatch, name):
    base = base_of(CLASSIFIERS[name]().double())
    plan = PLANS["mixer"]
    tree = double(random_serving_tree(base, plan))
    texts = [replace(text, label=at % 3) for at, text in enumerate(TEXTS)]
    share = Share(Fit(plan, tree, frozenset(tree)), texts, 0, unclipped())
    gradients, _ = gradients_seen(monkeypatch, Group.of(base, [share], FULL))
    assert any(key.slot == HEAD for key in gradients)
    for number, text in enumerate(texts):
        wanted = gradient_alone(base, plan, tree, text, list(gradients))
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient[number], wanted[key], rtol=1e-6, atol=1e-6)


def deberta():
    """Its query and key layers see the table of positions as well: no two texts share a pass."""
    config = DebertaV2Config(
        **SIZES,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = base_of(DebertaV2ForSequenceClassification(config).double())
    assert not base.adapted.shares_passes
    return base


def test_texts_that_cannot_share_a_pass_have_gradients_of_their_own(monkeypatch):
    base, plan = deberta(), PLANS["mixer"]
    tree = double(random_serving_tree(base, plan))
    texts = [replace(text, label=at % 3) for at, text in enumerate(TEXTS)]
    share = Share(Fit(plan, tree, frozenset(tree)), texts, 0, unclipped())
    gradients, losses = gradients_seen(monkeypatch, Group.of(base, [share], FULL))
    assert len(losses) == len(texts)
    for number, text in enumerate(texts):
        wanted = gradient_alone(base, plan, tree, text, list(gradients))
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient[number], wanted[key], rtol=1e-6, atol=1e-6)
    saving = replace(FULL, gradient_checkpointing=True)
    plainly, saved = (train_together(base, [share], each)[0] for each in (FULL, saving))
    for key, tensor in plainly.tree.items():
        torch.testing.assert_close(saved.tree[key], tensor, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_without_noise_and_limit_full_batches_train_as_plainly(plan):
    """Answers are of one length here: a text counts as much as another, not a token."""
    base = base_of(llama().double())
    tree = double(random_serving_tree(base, plan))
    texts = [example("ab c", "xy"), example("d", "zz"), example("abcdef gh", "qr")]
    order = Fit(plan, tree, frozenset(tree))
    plainly = train(base, order, texts, replace(FULL, local_epochs=3), seed=0)
    (privately,) = train_together(
        base, [Share(order, texts, 0, unclipped())], replace(FULL, local_epochs=3)
    )
    assert privately.steps == plainly.steps == 3
    assert privately.loss == pytest.approx(plainly.loss, rel=1e-6)
    for key, tensor in plainly.tree.items():
        torch.testing.assert_close(privately.tree[key], tensor, rtol=1e-7, atol=1e-7)


def test_clients_that_share_a_pass_train_as_each_alone():
    base = base_of()
    plan = PLANS["mixer"]
    orders = [
        Fit(plan, tree, frozenset(tree))
        for tree in (random_serving_tree(base, plan, seed) for seed in range(2))
    ]
    texts = [TEXTS[:3], TEXTS[2:]]
    training = Training(lr=1e-2, batch_size=2, local_epochs=2)

    def shares():
        return [
            Share(order, own, at, Clipping(0.5, 1.0, Randomness(at)))
            for at, (order, own) in enumerate(zip(orders, texts, strict=True))
        ]

    together = train_together(base, shares(), training)
    for share, result in zip(shares(), together, strict=True):
        (alone,) = train_together(base, [share], training)
        for key, tensor in alone.tree.items():
            torch.testing.assert_close(result.tree[key], tensor, rtol=0, atol=2e-5)


def test_each_text_is_cut_to_the_norm_over_all_tensors():
    a, b = Name("s", "own", "A"), Name("s", "own", "B")
    gradients = {
        a: torch.tensor([[[3.0]], [[0.3]], [[30.0]]]),
        b: torch.tensor([[[4.0]], [[0.4]], [[40.0]]]),
    }
    owners = torch.tensor([0, 0, 1])
    summed = clipped_sum(gradients, owners, torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(summed[a], torch.tensor([[[0.6 + 0.3]], [[6.0]]]))
    torch.testing.assert_close(summed[b], torch.tensor([[[0.8 + 0.4]], [[8.0]]]))


def test_noise_is_clip_times_noise_wide_and_the_sum_is_over_the_expected_batch():
    name = Name("s", "own", "A")
    summed = {name: torch.full((1, 10_000), 6.0, dtype=torch.float64)}
    clipping = Clipping(0.5, 4.0, Randomness())
    (mean,) = noised_mean(summed, [clipping], [3]).values()
    # The standard error of a mean of 10,000 draws is 1 % of their deviation, here 2/3.
    assert float(mean.mean()) == pytest.approx(2.0, abs=5 * 2 / 3 / 100)
    assert float(mean.std()) == pytest.approx(2 / 3, rel=5 / math.sqrt(2 * 10_000))


def test_secret_noise_is_normal_and_never_the_same():
    drawn = Randomness().normal(10_000)
    assert drawn.dtype == torch.float64
    assert not torch.equal(drawn, Randomness().normal(10_000))
    within = [float((drawn.abs() < limit).double().mean()) for limit in (1.0, 2.0, 3.0)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.02)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.05)
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) < 0.05


def test_the_largest_random_number_is_below_1_and_its_noise_finite(monkeypatch):
    monkeypatch.setattr("fedalt.core.noise.os.urandom", lambda size: b"\xff" * size)
    assert float(Randomness().uniform(1)[0]) < 1
    assert bool(Randomness().normal(1).isfinite().all())
    assert Randomness().sample(3, 1.0) == [0, 1, 2]


def test_a_seed_of_ones_own_makes_noise_repeatable():
    assert torch.equal(Randomness(3, "a").normal(5), Randomness(3, "a").normal(5))
    assert not torch.equal(Randomness(3, "a").normal(5), Randomness(3, "b").normal(5))


def test_every_text_is_in_a_batch_with_the_same_probability():
    clipping = Clipping(1.0, 1.0, Randomness(0))
    batches = clipping.batches(range(10), 4, 1000)
    assert len(batches) == 3000
    counts = [sum(text in batch for batch in batches) for text in range(10)]
    assert rate(10, 4) == 0.4
    # 5 standard deviations of a binomial of 3000 draws at 0.4.
    assert all(abs(count - 1200) < 5 * math.sqrt(3000 * 0.4 * 0.6) for count in counts)
    assert len({len(batch) for batch in batches}) > 5


def test_a_step_without_a_text_is_noise_alone():
    base = base_of()
    plan = PLANS["single"]
    tree = random_serving_tree(base, plan)
    share = Share(Fit(plan, tree, frozenset(tree)), TEXTS, 0, Clipping(1.0, 2.0, Randomness(1)))
    group = Group.of(base, [share], FULL)
    group.clients[0].batches = [[]]
    (loss,), gradients = group.step(0)
    assert loss == 0.0
    spread = torch.cat([gradient.flatten() for gradient in gradients.values()]).std()
    assert float(spread) == pytest.approx(2.0 / len(TEXTS), rel=0.1)


def test_a_penalty_beside_the_texts_is_refused():
    base = base_of()
    plan = PLANS["single"]
    tree = random_serving_tree(base, plan)
    order = Fit(plan, tree, frozenset(tree), penalty=lambda tree: torch.zeros(()))
    with pytest.raises(ValueError, match="penalty"):
        train_together(base, [Share(order, TEXTS, 0, unclipped())], FULL)
