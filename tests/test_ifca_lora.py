"""The oracles of IFCA with LoRA: who chooses what, means of groups, how the adapters begin."""

from dataclasses import replace

import pytest
import torch
from bases import base_of, example, random_serving_tree
from federation import (
    EXAMPLES,
    SITES,
    START,
    MemoryStates,
    one_by_one,
    pull,
    run_one,
    served,
    simulate,
)
from runs_for_tests import save_model, settings_for, write_clients

from fedalt.adapters.plan import HEAD
from fedalt.core import tree as trees
from fedalt.core.codec import encode
from fedalt.core.tree import move, select
from fedalt.engine.generators import run_generators
from fedalt.evaluation import Scoring, score
from fedalt.methods.clustering import spread_out
from fedalt.methods.contract import Message, Serving
from fedalt.methods.experts import expert
from fedalt.methods.fedit import FedIT
from fedalt.methods.ifca_lora import CHOSEN, IFCALoRA
from fedalt.methods.lora import Lora
from fedalt.runs.setup import prepare, trainer_of
from fedalt.training.orders import Fit, Fitted, Found, Search, look_at

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = IFCALoRA(lora=LORA, groups=2)
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())
TARGET = {"a": 1.0, "b": 1.1, "c": -1.0, "d": -1.2}  # a and b want nearly the same, so do c and d


def towards_targets(client_id, number, order):
    """Training ends at the client's target; the loss of a tree is its distance from that."""
    if isinstance(order, Search):
        adapter = select(order.tree_of(()), CHOSEN)
        gaps = [(t - target_of(client_id, n, t)).square().sum() for n, t in adapter.items()]
        return Found((), float(torch.stack(gaps).sum()))
    names = [name for name in order.train if name.slot == CHOSEN]
    ends = {name: target_of(client_id, name, order.tree[name]) for name in names}
    return Fitted(trees.replace(order.tree, ends), EXAMPLES.get(client_id, 20))


def target_of(client_id, name, like):
    """Two directions: B of ones here, A of ones or, with the other sign, of its odd columns."""
    value = torch.full_like(like, abs(TARGET[client_id]))
    if name.factor == "A" and TARGET[client_id] < 0:
        value[:, ::2] = 0
    return value


def values(adapters, slot, factor):
    """The largest numbers of a slot's factors: here they tell whose mean it is."""
    return {round(float(t.max()), 6) for n, t in select(adapters, slot).items() if n[2] == factor}


def test_clients_choose_the_adapter_of_lowest_loss_and_groups_are_averaged():
    states, _ = simulate(METHOD, ["abcd"], train=towards_targets)
    first = states["server"].adapters
    assert {name.slot for name in first} == {"expert_0", "expert_1"}
    simulate(METHOD, ["abcd"], states, train=towards_targets)
    after = states["server"].adapters
    found = [values(after, expert(group), "B") for group in (0, 1)]
    assert sorted(map(tuple, found)) == [(1.05,), (1.1,)]  # means of 1 and 1.1, of 1 and 1.2
    same = served(METHOD, states, "abcd", towards_targets)
    for one, other in ("ab", "cd"):
        assert trees.equal(same[one].tree, same[other].tree)
    assert not trees.equal(same["a"].tree, same["c"].tree)


def test_weights_by_examples_and_groups_that_nobody_chooses():
    method = replace(METHOD, weighting="examples")
    states, _ = simulate(method, ["abcd"], train=towards_targets)
    before = states["server"].adapters
    simulate(method, ["ab"], states, train=towards_targets)  # 10 and 30 examples
    after = states["server"].adapters
    changed = [g for g in (0, 1) if values(after, expert(g), "B") == {1.075}]
    assert len(changed) == 1
    (other,) = {0, 1} - set(changed)
    assert trees.equal(select(after, expert(other)), select(before, expert(other)))


def test_the_first_of_equal_adapters_is_chosen():
    twice = START.adapter(LORA.slot(CHOSEN))
    message = Message({**move(twice, CHOSEN, expert(0)), **move(twice, CHOSEN, expert(1))})
    client = METHOD.init_client(START, "a")
    _, upload = run_one(METHOD.local(client, message), towards_targets, "a")
    assert upload.facts == {"weight": 1.0, "group": 0}


def test_the_last_of_three_is_chosen_where_its_loss_is_lowest():
    one = START.adapter(LORA.slot(CHOSEN))
    message = Message(trees.merge(*(move(one, CHOSEN, expert(group)) for group in range(3))))
    losses = iter([2.0, float("inf"), 1.5])

    def answers(client_id, number, order):
        if isinstance(order, Search):
            return Found((), next(losses))
        return pull(client_id, number, order)

    _, upload = run_one(METHOD.local(METHOD.init_client(START, "a"), message), answers, "a")
    assert upload.facts["group"] == 2
    assert {name.slot for name in upload.tree} == {CHOSEN}


def test_adapters_begin_as_uploads_of_clients_far_apart():
    # On a line at 0, 1, 5 and 9: 1 is nearest to all, 9 farthest from it, then 5, then 0.
    at = torch.tensor([0.0, 1.0, 5.0, 9.0], dtype=torch.float64)
    far = (at[:, None] - at).abs()
    assert spread_out(far, 3) == [1, 3, 2]
    assert spread_out(far, 9) == [1, 3, 2, 0]
    assert spread_out(torch.zeros(3, 3, dtype=torch.float64), 2) == [0]
    states, _ = simulate(METHOD, ["abcd"], train=towards_targets)
    # Of a and b, who want A of ones, one begins an adapter; of c and d, with holes in A, the other.
    holes = [
        {bool((t == 0).any()) for n, t in states["server"].adapters.items() if n[1:] == (slot, "A")}
        for slot in (expert(0), expert(1))
    ]
    assert sorted(map(list, holes)) == [[False], [True]]


def test_a_first_upload_of_zeros_begins_no_adapter():
    def nothing_of_b(client_id, number, order):
        if client_id == "b" and isinstance(order, Fit):
            return Fitted(order.tree, 10)  # its B is zero
        return towards_targets(client_id, number, order)

    states, _ = simulate(METHOD, ["b"], train=nothing_of_b)
    drawn = METHOD.init_server(START)
    assert trees.equal(states["server"].adapters, drawn.adapters)
    simulate(METHOD, ["abc"], states, train=nothing_of_b)
    begun = [values(states["server"].adapters, expert(group), "B") for group in (0, 1)]
    assert begun == [{1.0}, {1.0}]


def test_one_group_is_fedit():
    one, fedit = replace(METHOD, groups=1), FedIT(lora=LORA)
    cohorts = [("a", "b", "c"), ("a", "c"), ("b",)]
    ours, _ = simulate(one, cohorts)
    theirs, _ = simulate(fedit, cohorts)
    mine = served(one, ours, "abc")
    for client_id, serving in served(fedit, theirs, "abc").items():
        own = mine[client_id].tree
        assert trees.equal(move(serving.tree, "shared", CHOSEN), select(own, CHOSEN))
        assert trees.equal(select(serving.tree, HEAD), select(own, HEAD))


def test_an_adapter_that_there_is_not_cannot_be_chosen():
    states, _ = simulate(METHOD, ["abcd"], train=towards_targets)
    _, upload = run_one(
        METHOD.local(METHOD.init_client(START, "a"), METHOD.broadcast(states["server"], "a")),
        towards_targets,
        "a",
    )
    for group in (-1, 2):
        wrong = replace(upload, facts={**upload.facts, "group": group})
        with pytest.raises(ValueError, match=f"'a' chose adapter {group} of 2"):
            METHOD.aggregate(states["server"], [("a", wrong)])


def test_bytes_are_m_adapters_down_and_one_up():
    states, costs = simulate(METHOD, ["abcd", "abcd"], train=towards_targets)
    sent = METHOD.broadcast(states["server"], "a")
    assert trees.numbers(sent.tree) == 2 * P
    assert costs[-1].download_bytes == len(encode(sent))
    assert abs(costs[-1].upload_bytes - 4 * P) < 2000
    assert abs(costs[-1].download_bytes - 2 * 4 * P) < 2000


def test_the_fit_after_looks_trains_on_the_batches_of_all_methods():
    states, _ = simulate(METHOD, ["abcd"], train=towards_targets)
    numbers = []

    def watch(orders):
        numbers.extend((type(order).__name__, number) for _, number, order in orders)
        return one_by_one(towards_targets)(orders)

    message = METHOD.broadcast(states["server"], "a")
    run_generators({"a": METHOD.local(METHOD.init_client(START, "a"), message)}, watch)
    assert numbers == [("Search", 0), ("Search", 0), ("Fit", 0)]


def test_a_look_is_the_loss_on_all_training_examples(tmp_path):
    data = write_clients(tmp_path / "data", "a", count=60)
    prepared = prepare(settings_for(save_model(tmp_path / "model"), data))
    trainer = trainer_of(prepared)
    tree = prepared.parts.init.adapter(LORA.slot(CHOSEN))
    order = look_at(LORA.plan(CHOSEN), trees.apply(torch.ones_like, tree))
    (found,) = trainer.execute([("a", 0, order)], when=0, states=MemoryStates())
    examples = trainer.task.examples("a", "train")
    assert len(examples) > 32
    serving = Serving(order.plan, order.tree_of(()))
    loss = score(trainer.base, serving, examples, Scoring(generate=False)).metrics["loss"]
    assert found == Found((), pytest.approx(loss, rel=1e-5))


@pytest.mark.parametrize("packed", [True, False])
def test_a_look_takes_earlier_answers_of_a_conversation_too(packed, monkeypatch):
    base = base_of()
    tree = random_serving_tree(base, LORA.plan(CHOSEN))
    serving = Serving(LORA.plan(CHOSEN), tree)
    examples = [example("abc def", "x"), example("gh ijklm", "yz")]
    places = [(2,), (1, 5)]

    def total(each, begin):
        """The loss of all that follows, as if it were the answer."""
        (mean,) = score(base, serving, [replace(each, answer_start=begin)], Scoring()).losses
        return mean * (len(each.ids) - begin)

    losses = [total(each, each.answer_start) for each in examples]
    for each, of_each in zip(examples, places, strict=True):
        losses += [total(each, at) - total(each, at + 1) for at in of_each]
    tokens = sum(len(each.ids) - each.answer_start for each in examples) + 3
    if not packed:
        monkeypatch.setattr("fedalt.evaluation.likelihood.can_pack", lambda *_: False)
    earlier = [replace(each, earlier=at) for each, at in zip(examples, places, strict=True)]
    (found,) = score(base, serving, earlier, Scoring(generate=False)).metrics.values()
    assert found == pytest.approx(sum(losses) / tokens, rel=1e-5)
