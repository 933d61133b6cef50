"""FedIT-split is FedIT in smaller pieces: the same numbers, unless a mixer weighs the pieces."""

from dataclasses import replace

import pytest
import torch
from bases import base_of, example, start_of, train
from federation import START, MemoryStates, one_by_one, pull, run_groups, served, simulate
from tiny import llama

from fedalt.adapters.plan import MIXER
from fedalt.core.tree import Name, select
from fedalt.methods.fedit import SHARED, FedIT
from fedalt.methods.fedit_split import FedITSplit
from fedalt.methods.lora import Lora
from fedalt.training.group import Training
from fedalt.training.orders import Fitted

WHOLE = FedIT(lora=Lora(rank=3, alpha=12, dropout=0.2), weighting="examples")
SPLIT = FedITSplit(lora=WHOLE.lora, weighting="examples")
DATA = {
    "a": [example("abc", "xy"), example("the quick brown fox", "jumps"), example("q", "z")],
    "b": [example("hello there", "general"), example("one two three", "four")],
}


def joined(tree):
    """The parts of every site as one adapter, in their order."""
    whole = {}
    for name in sorted(tree):
        if name.slot.startswith("part_"):
            whole.setdefault(name._replace(slot=SHARED), []).append(tree[name])
    return {name: torch.cat(parts, 0 if name.factor == "A" else 1) for name, parts in whole.items()}


def trained_for_real(base, method, rounds):
    """The server's adapter before the first round and after every one, on a tiny real model."""
    training = Training(lr=2e-2, batch_size=1, local_epochs=2, clip=0.5, weight_decay=0.1)

    def carry_out(client_id, number, order):
        trained = train(base, order, DATA[client_id], training, seed=len(seen))
        return Fitted(trained.tree, len(DATA[client_id]))

    init, states = start_of(base), MemoryStates()
    seen = [method.init_server(init)]
    for _ in range(rounds):
        run_groups(method, init, states, [sorted(DATA)], one_by_one(carry_out))
        seen.append(states["server"])
    return seen


def test_parts_of_unequal_rank_train_step_by_step_as_fedit_of_the_summed_rank():
    # In float64, as AdamW makes whole steps of what rounding leaves of a gradient that is 0.
    base = base_of(llama().double())
    fedit = [server.adapter for server in trained_for_real(base, WHOLE, 3)]
    split = [joined(server.adapters) for server in trained_for_real(base, SPLIT, 3)]
    moved = max((fedit[-1][name] - fedit[0][name]).abs().max() for name in fedit[0])
    assert moved > 0.05
    for ours, theirs in zip(split, fedit, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-6, msg=str(name))


def test_with_a_mixer_it_is_another_method():
    base = base_of()
    fedit = trained_for_real(base, WHOLE, 2)[-1].adapter
    mixed = joined(trained_for_real(base, replace(SPLIT, mixer=True), 2)[-1].adapters)
    assert max((mixed[name] - fedit[name]).abs().max() for name in fedit) > 1e-3


def test_every_part_has_the_scaling_of_the_unsplit_lora_and_together_they_have_its_rank():
    split = FedITSplit(lora=Lora(rank=8, alpha=32), parts=3)
    states, _ = simulate(split, [("a",)])
    plan = served(split, states, "a")["a"].plan
    assert [slot.rank for slot in plan.slots] == [3, 3, 2]
    assert {slot.scaling for slot in plan.slots} == {4.0}
    assert plan.combine.weights == (1.0, 1.0, 1.0)
    start = joined(split.init_server(START).adapters)
    for name, tensor in FedIT(lora=split.lora).init_server(START).adapter.items():
        assert torch.equal(start[name], tensor)


def test_the_mixer_is_averaged_like_the_factors():
    split = FedITSplit(lora=Lora(rank=2), mixer=True)
    trained = {}

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        trained[client_id] = fitted.tree
        return fitted

    states, _ = simulate(split, [("a", "b")], train=watch)
    name = Name("block.0.q", MIXER, "G")
    mean = (trained["a"][name] + trained["b"][name]) / 2
    torch.testing.assert_close(states["server"].adapters[name], mean, rtol=0, atol=1e-6)
    for serving in served(split, states, "ab").values():
        assert torch.equal(serving.tree[name], states["server"].adapters[name])
    assert not select(simulate(replace(split, mixer=False), [("a",)])[0]["server"].adapters, MIXER)


@pytest.mark.parametrize("parts", [0, 4])
def test_a_part_has_at_least_rank_1(parts):
    with pytest.raises(ValueError, match=f"parts={parts} of a LoRA of rank 3"):
        FedITSplit(lora=Lora(rank=3), parts=parts)
