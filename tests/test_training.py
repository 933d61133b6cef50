"""Batches, the loss on answers only, and the training loop, on tiny random models."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from bases import base_of, example, random_serving_tree, start_of, train
from tiny import CAUSAL, CLASSIFIERS
from torch.nn import functional

from fedalt.adapters.plan import HEAD, MIXER, Mixer, Plan, Slot, names_of, single
from fedalt.core import tree as trees
from fedalt.core.seeds import generator
from fedalt.data.examples import Example
from fedalt.training import group
from fedalt.training.batches import collate, epoch_order, steps_per_epoch
from fedalt.training.group import Training, TrainingError
from fedalt.training.loss import client_means, cross_entropy, token_losses
from fedalt.training.orders import Fit, Moments

CPU = torch.device("cpu")
SLOTS = (Slot("individual", 2, 4), Slot("rest_of_world", 2, 4))
PLAIN = single(SLOTS[0])
MIXED = Plan(SLOTS, Mixer(), dropout=0.1)
EXAMPLES = [
    example("abc", "xy"),
    example("the quick brown fox", "jumps"),
    example("q", "z"),
    example("hello there", "general"),
    example("one two three", "four"),
]
FAST = Training(lr=1e-2, batch_size=2, local_epochs=2)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_of_a_padded_batch_equals_that_of_each_example_alone(name):
    base = base_of(CAUSAL[name]())
    tree = random_serving_tree(base, PLAIN)
    batch = collate([EXAMPLES], base.pad_id, CPU)
    with base.adapted.bound(PLAIN, tree) as model:
        together = token_losses(model, batch)
        alone = []
        for each in EXAMPLES:
            logits = model(input_ids=torch.tensor([each.ids])).logits[0]
            targets = torch.tensor(each.ids[each.answer_start :])
            before = logits[each.answer_start - 1 : len(each.ids) - 1]
            alone.append(functional.cross_entropy(before, targets, reduction="none"))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)


def test_cross_entropy_and_its_derivatives_are_those_of_torch():
    stream = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(37, 11, generator=stream)).requires_grad_()
    targets = torch.randint(11, (37,), generator=stream)
    weights = torch.randn(37, generator=stream)

    def derivatives(losses):
        (first,) = torch.autograd.grad(losses @ weights, logits, create_graph=True)
        return losses, first, *torch.autograd.grad(first.square().sum(), logits)

    wanted = derivatives(functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(derivatives(cross_entropy(logits, targets)), wanted)
    (plain,) = torch.autograd.grad(cross_entropy(logits, targets) @ weights, logits)
    torch.testing.assert_close(plain, wanted[1])
    half = cross_entropy(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_exist_only_where_an_answer_is_predicted(name):
    base = base_of(CAUSAL[name]())
    batch = collate([EXAMPLES], base.pad_id, CPU)
    seen = []
    head = base.adapted.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *args: seen.append(args[-1].shape))
    token_losses(base.adapted.model, batch)
    handle.remove()
    assert [shape[:-1].numel() for shape in seen] == [len(batch.targets)]
    token_losses(base.adapted.model, batch)  # the hook that picked the rows is gone again
    assert base.adapted.model(input_ids=batch.ids).logits.shape[:2] == batch.ids.shape


def test_every_client_of_a_batch_has_a_mean_of_its_own():
    base = base_of()
    short, long = [EXAMPLES[0]], [EXAMPLES[1]]
    batch = collate([short, long], base.pad_id, CPU)
    losses = token_losses(base.adapted.model, batch)
    means = client_means(losses, batch, 2)
    torch.testing.assert_close(means, torch.stack([losses[:3].mean(), losses[3:].mean()]))


def test_an_epoch_takes_every_example_once_in_batches_of_similar_length():
    lengths = [1 + (7 * i) % 90 for i in range(333)]
    batches = list(epoch_order(lengths, 8, generator("test")))
    assert sorted(index for batch in batches for index in batch) == list(range(333))
    assert len(batches) == steps_per_epoch(333, 8)
    padding = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)
    assert padding < 0.2 * sum(lengths)
    assert batches != list(epoch_order(lengths, 8, generator("another")))


def test_a_small_client_meets_other_examples_in_every_epoch():
    lengths = [1 + (7 * i) % 90 for i in range(96)]
    stream = generator("test")

    def mates():
        batches = [set(batch) for batch in epoch_order(lengths, 8, stream)]
        return {(i, j) for batch in batches for i in batch for j in batch if i < j}

    epochs = [mates() for _ in range(6)]
    again = [len(one & next_) / len(one) for one, next_ in pairwise(epochs)]
    assert sum(again) / len(again) < 0.2  # 0.07 by chance, 0.88 with one pool for all


@pytest.mark.parametrize("examples", [1, 7, 8, 128, 129, 300])
def test_steps_are_foretold(examples):
    assert steps_per_epoch(examples, 8) == len(list(epoch_order([1] * examples, 8, generator(0))))


def fedalt_start(base):
    init = start_of(base)
    tree = trees.merge(*(init.adapter(slot) for slot in SLOTS), init.mixer(2), init.head())
    return tree, names_of(tree, "individual", MIXER, HEAD)


def test_training_lowers_the_loss_and_changes_the_wanted_tensors_only():
    base = base_of()
    before = {key: value.clone() for key, value in base.adapted.model.state_dict().items()}
    tree, wanted = fedalt_start(base)
    kept = trees.copy(tree)
    trained = train(base, Fit(MIXED, tree, wanted, 1), EXAMPLES, FAST, seed=1)
    again = train(base, Fit(MIXED, trained.tree, wanted, 40), EXAMPLES, FAST, seed=2)
    assert again.loss < 0.6 * trained.loss
    assert trees.equal(tree, kept)
    for name, tensor in trained.tree.items():
        assert torch.equal(tensor, kept[name]) == (name not in wanted), name
        assert tensor.grad is None
        assert not tensor.requires_grad
    after = base.adapted.model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert trained.steps == 3
    assert trained.tokens == sum(len(each.ids) for each in EXAMPLES)


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others():
    base = base_of()
    tree, wanted = fedalt_start(base)

    def run(seed):
        return train(base, Fit(MIXED, tree, wanted, 2), EXAMPLES, FAST, seed=seed).tree

    assert trees.equal(run(3), run(3))
    assert not trees.equal(run(3), run(4))


def test_gradient_checkpointing_changes_no_number():
    base = base_of()
    tree, wanted = fedalt_start(base)
    saving = replace(FAST, gradient_checkpointing=True)
    plain = train(base, Fit(MIXED, tree, wanted, 2), EXAMPLES, FAST, seed=5)
    saved = train(base, Fit(MIXED, tree, wanted, 2), EXAMPLES, saving, seed=5)
    for name, tensor in plain.tree.items():
        torch.testing.assert_close(saved.tree[name], tensor, rtol=0, atol=1e-6)
    assert not base.adapted.model.training


def test_fits_with_gradient_checkpointing_leave_nothing_behind():
    base = base_of()
    tree, wanted = fedalt_start(base)
    embedding = base.adapted.model.get_input_embeddings()
    for seed in range(3):
        saving = replace(FAST, gradient_checkpointing=True)
        train(base, Fit(MIXED, tree, wanted, 1), EXAMPLES, saving, seed=seed)
        assert not embedding._forward_hooks
    assert not any(module.training for module in base.adapted.model.modules())


@pytest.mark.parametrize("name", CAUSAL)
def test_gradient_checkpointing_runs_blocks_again_and_changes_nothing_inside_them(name):
    """A router that chooses at random while it trains must not do so here."""
    base = base_of(CAUSAL[name]())
    tree = random_serving_tree(base, PLAIN)
    site, runs = next(iter(base.adapted.sites)), []
    layer = base.adapted.model.get_submodule(f"{site}.base_layer")
    layer.register_forward_hook(lambda layer, *_: runs.append(layer.training))
    counts = []
    for saves in (False, True):
        training = Training(lr=1e-2, batch_size=5, gradient_checkpointing=saves)
        train(base, Fit(PLAIN, tree, frozenset(tree), 1), EXAMPLES, training, seed=0)
        counts.append(len(runs))
    assert counts == [1, 3]  # once, and then once more and again
    assert not any(runs)


@pytest.mark.parametrize("can", [True, False])
def test_who_runs_out_of_memory_hears_of_gradient_checkpointing_where_it_works(monkeypatch, can):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    base = base_of()
    tree, wanted = fedalt_start(base)
    monkeypatch.setattr(base.adapted.model, "supports_gradient_checkpointing", can)
    monkeypatch.setattr(group, "token_losses", fail)
    with pytest.raises(TrainingError, match="lower --batch-size") as error:
        train(base, Fit(MIXED, tree, wanted, 1), EXAMPLES, FAST, seed=0)
    assert ("--gradient-checkpointing" in str(error.value)) == can


def test_the_learning_rate_falls_to_zero_within_a_round():
    # One step at the full rate, the next at half: AdamW's steps are at most of that size.
    base = base_of()
    tree = random_serving_tree(base, MIXED)
    wanted = names_of(tree, MIXER)
    training = Training(lr=1e-2, batch_size=5, weight_decay=0.0)
    one = train(base, Fit(MIXED, tree, wanted, 1), EXAMPLES, training, seed=6)
    two = train(base, Fit(MIXED, tree, wanted, 2), EXAMPLES, training, seed=6)
    for name in wanted:
        first = (one.tree[name] - tree[name]).abs().max()
        second = (two.tree[name] - one.tree[name]).abs().max()
        assert first == pytest.approx(1e-2, rel=0.02)
        assert second < 0.6e-2


def test_carried_moments_continue_where_they_were_and_are_not_kept_unasked():
    base = base_of()
    tree, wanted = fedalt_start(base)
    first = train(base, Fit(MIXED, tree, wanted, 1, moments=Moments()), EXAMPLES, FAST, seed=7)
    assert first.moments.steps == 3
    assert first.moments.first.keys() == wanted
    order = Fit(MIXED, first.tree, wanted, 1)
    on = train(base, replace(order, moments=first.moments), EXAMPLES, FAST, seed=8)
    fresh = train(base, order, EXAMPLES, FAST, seed=8)
    assert on.moments.steps == 6
    assert not trees.equal(on.tree, fresh.tree)
    assert train(base, Fit(MIXED, tree, wanted, 1), EXAMPLES, FAST, seed=7).moments == Moments()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_learns_its_labels(name):
    base = base_of(CLASSIFIERS[name]())
    examples = [
        Example(tuple(range(3 + i, 8 + i)), 5, str(i % 3), ("0", "1", "2"), i % 3)
        for i in range(12)
    ]
    init = start_of(base)
    tree = trees.merge(init.adapter(SLOTS[0]), init.head())
    training = Training(lr=2e-2, batch_size=4)
    wanted = frozenset(tree)
    first = train(base, Fit(PLAIN, tree, wanted, 1), examples, training, seed=0)
    last = train(base, Fit(PLAIN, first.tree, wanted, 30), examples, training, seed=1)
    assert last.loss < 0.5 * first.loss


def test_a_loss_that_is_not_finite_ends_with_advice():
    base = base_of()
    tree, wanted = fedalt_start(base)
    broken = {name: tensor * float("nan") for name, tensor in tree.items()}
    with pytest.raises(TrainingError, match="a lower learning rate"):
        train(base, Fit(MIXED, broken, wanted, 1), EXAMPLES, FAST, seed=0)


OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from bases import base_of, example, train
from test_training import FAST, PLAIN, SLOTS, start_of
from fedalt.training.group import Training, TrainingError
from fedalt.training.orders import Fit
base = base_of()
tree = start_of(base).adapter(SLOTS[0])
big = [example("a" * 60, "b")] * 20000
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, used + 400_000_000))
try:
    order = Fit(PLAIN, tree, frozenset(tree), epochs=1)
    train(base, order, big, Training(batch_size=20000), seed=0)
except TrainingError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space the Linux way")
def test_running_out_of_memory_says_what_was_tried_and_what_to_lower():
    script = OUT_OF_MEMORY.format(tests=str(__file__).rpartition("/")[0])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "batch of 20000 examples of up to 62 tokens; lower --batch-size" in done.stdout, done
