"""The oracles of FDLoRA: the seed, the outer step, who keeps what, fusion, a real search, a run."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from commands import call
from federation import (
    EXAMPLES,
    SITES,
    START,
    ByteStates,
    MemoryStates,
    assert_same_servings,
    one_by_one,
    pull,
    run_groups,
    run_one,
    served,
    simulate,
)
from runs_for_tests import adapters_of, scores_of, settings_for

from fedalt.core import tree as trees
from fedalt.core.codec import read
from fedalt.core.tree import Name, move, select
from fedalt.engine import local_trainer as engine
from fedalt.evaluation import Scoring, score
from fedalt.methods import METHODS
from fedalt.methods.contract import Message, Serving
from fedalt.methods.fdlora import FUSED, INDIVIDUAL, MIDDLE, SHARED, Client, FDLoRA, Server
from fedalt.methods.lora import Lora
from fedalt.runs.length import is_finished
from fedalt.runs.lifecycle import reopen, resume_run, start_run
from fedalt.runs.setup import prepare, trainer_of
from fedalt.training.orders import Fit, Found, Moments

LORA = Lora(rank=2, alpha=4, dropout=0.0)
METHOD = FDLoRA(lora=LORA)
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())
CLIENTS = ("a", "b", "c")


class Watch:
    """Carries orders out as `pull` does, or as told, and keeps them and the answers by client."""

    def __init__(self, carry_out=pull):
        self.carry_out, self.orders, self.answers = carry_out, {}, {}

    def __call__(self, client_id, number, order):
        answer = self.carry_out(client_id, number, order)
        self.orders.setdefault(client_id, []).append(order)
        self.answers.setdefault(client_id, []).append(answer)
        return answer

    def adapter(self, client_id, round_, slot):
        return select(self.answers[client_id][round_].tree, slot)


def finds(*weights):
    """Carries out a search by finding these numbers."""
    return lambda client_id, number, order: Found(weights, 0.0)


def close(left, right, tolerance=1e-6):
    trees.require_same_names(left, right, "left")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance)


def same(left, right):
    return trees.equal(left, right) and bool(left)


def random_adapter(slot, seed):
    stream = torch.Generator().manual_seed(seed)
    shapes = START.adapter(LORA.slot(slot))
    return {name: torch.randn(like.shape, generator=stream) for name, like in shapes.items()}


def products(tree, slot):
    """B A of every site, in float64."""
    return {
        site: tree[Name(site, slot, "B")].double() @ tree[Name(site, slot, "A")].double()
        for site in SITES
    }


# The seed and the outer step.


def test_the_seed_is_the_mean_of_the_individual_adapters():
    watch = Watch()
    states, _ = simulate(METHOD, [("a", "b")], train=watch)
    a, b = (watch.adapter(each, 0, INDIVIDUAL) for each in "ab")
    half = move(trees.scale(trees.add(a, b), 0.5), INDIVIDUAL, SHARED)
    close(states["server"].adapter, half)
    by_data = replace(METHOD, weighting="examples")
    states, _ = simulate(by_data, [("a", "b")])
    assert (EXAMPLES["a"], EXAMPLES["b"]) == (10, 30)
    quarter = trees.add(trees.scale(a, 0.25), trees.scale(b, 0.75))
    close(states["server"].adapter, move(quarter, INDIVIDUAL, SHARED))


def test_the_seed_of_one_client_is_its_individual_adapter():
    states, _ = simulate(METHOD, [("a",)])
    seed = move(states["server"].adapter, SHARED, INDIVIDUAL)
    assert same(seed, states["clients/a"].individual)


@pytest.mark.parametrize("outer", ["nesterov", "heavy_ball"])
def test_with_rate_one_and_no_momentum_the_outer_step_is_the_mean_of_the_global_adapters(outer):
    method = replace(METHOD, outer=outer, outer_lr=1.0, momentum=0.0)
    watch = Watch()
    states, _ = simulate(method, [CLIENTS] * 3, train=watch)
    a, b, c = (watch.adapter(each, 2, SHARED) for each in CLIENTS)
    close(states["server"].adapter, trees.scale(trees.add(trees.add(a, b), c), 1 / 3))


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "heavy_ball"])
def test_the_outer_steps_are_those_of_torch_s_sgd_fed_with_the_difference(nesterov):
    method = replace(METHOD, outer="nesterov" if nesterov else "heavy_ball")
    assert (method.outer_lr, method.momentum) == (0.7, 0.9)
    start = random_adapter(SHARED, 0)
    server = Server(start, rounds=1)
    theirs = {name: tensor.double().requires_grad_() for name, tensor in start.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=0.7, momentum=0.9, nesterov=nesterov)
    for round_ in range(1, 6):
        phi = [random_adapter(SHARED, 10 * round_ + client) for client in range(2)]
        replies = [(str(at), Message(tree, {"weight": 1.0})) for at, tree in enumerate(phi)]
        server = method.aggregate(server, replies)
        for name, parameter in theirs.items():
            parameter.grad = parameter.detach() - (phi[0][name] + phi[1][name]).double() / 2
        sgd.step()
        close(server.adapter, {name: each.detach().float() for name, each in theirs.items()}, 1e-4)
    assert server.rounds == 6


def test_a_rate_of_a_thousandth_all_but_stops_the_global_adapter():
    # Clients always 1 ahead: v_t = 2 (1 - 0.5^t), so 30 steps of 1e-3 (1 + v_t / 2) make 0.059.
    method = replace(METHOD, outer_lr=1e-3, momentum=0.5)
    server = Server(trees.zeros_like(random_adapter(SHARED, 0)), rounds=1)
    for _ in range(30):
        ahead = trees.apply(lambda tensor: tensor + 1, server.adapter)
        server = method.aggregate(server, [("a", Message(ahead, {"weight": 1.0}))])
    for tensor in server.adapter.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.059), rtol=0, atol=1e-5)


# Who trains, keeps and sends what.


def test_every_h_rounds_a_client_keeps_its_own_copy_of_the_global_adapter():
    method = replace(METHOD, sync_every=2)
    watch, states, kept = Watch(), None, []
    for _ in range(5):
        states, _ = simulate(method, [CLIENTS], states, train=watch)
        kept.append({each: states[f"clients/{each}"].individual for each in CLIENTS})
    for each in CLIENTS:
        assert same(kept[0][each], watch.adapter(each, 0, INDIVIDUAL))
        assert same(kept[1][each], kept[0][each])
        assert same(kept[2][each], move(watch.adapter(each, 2, SHARED), SHARED, INDIVIDUAL))
        assert same(kept[3][each], kept[2][each])
        assert same(kept[4][each], move(watch.adapter(each, 4, SHARED), SHARED, INDIVIDUAL))
        assert not same(kept[4][each], move(states["server"].adapter, SHARED, INDIVIDUAL))
    assert not same(kept[4]["a"], kept[4]["b"])


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_by_default_a_client_copies_the_global_adapter_in_the_shortest_run_that_has_one(rounds):
    watch = Watch()
    states, _ = simulate(METHODS["fdlora"], [CLIENTS] * rounds, train=watch)
    for each in CLIENTS:
        newest = watch.answers[each][-1].tree
        assert same(
            move(select(newest, SHARED), SHARED, INDIVIDUAL), states[f"clients/{each}"].individual
        )


def test_stage_2_trains_the_global_adapter_alone_from_where_the_server_is():
    watch, states = Watch(), None
    for _ in range(3):
        given = states["server"].adapter if states else None
        states, _ = simulate(METHOD, [CLIENTS], states, train=watch)
        for each in CLIENTS:
            order = watch.orders[each][-1]
            slot = SHARED if given else INDIVIDUAL
            assert [part.name for part in order.plan.slots] == [slot]
            assert order.descending == order.tree.keys()
            if given:
                assert same(select(order.tree, SHARED), given)


def test_an_absent_client_keeps_everything_and_goes_on_where_all_others_do():
    method = replace(METHOD, sync_every=1)
    watch = Watch()
    states, _ = simulate(method, [("a", "b")] * 2, train=watch)
    before = states["clients/b"]
    states, _ = simulate(method, [("a",)], states, train=watch)
    assert states["clients/b"] is before
    given = states["server"].adapter
    simulate(method, [("a", "b")], states, train=watch)
    assert same(select(watch.orders["b"][-1].tree, SHARED), given)
    assert watch.orders["b"][-1].moments == before.moments


def test_a_late_client_trains_its_own_adapter_first_and_that_counts_for_nothing():
    with_c, without_c = Watch(), Watch()
    late, costs = simulate(METHOD, [("a", "b"), ("a", "b"), CLIENTS], train=with_c)
    states, _ = simulate(METHOD, [("a", "b")] * 3, train=without_c)
    assert same(late["server"].adapter, states["server"].adapter)
    assert costs[-1].client_id == "c"
    assert costs[-1].upload_bytes == 0
    first = with_c.orders["c"][0]
    assert same(select(first.tree, INDIVIDUAL), START.adapter(LORA.slot(INDIVIDUAL)))
    assert first.moments is None
    assert same(late["clients/c"].individual, with_c.adapter("c", 0, INDIVIDUAL))
    given = late["server"].adapter
    simulate(METHOD, [CLIENTS], late, train=with_c)
    assert same(select(with_c.orders["c"][1].tree, SHARED), given)


def test_an_adapter_goes_up_in_every_round_and_down_in_all_but_the_first():
    states = None
    for download in (0, P, P):
        server = states["server"] if states else METHOD.init_server(START)
        client = states["clients/a"] if states else METHOD.init_client(START, "a")
        message = METHOD.broadcast(server, "a")
        _, upload = run_one(METHOD.local(client, message), pull, "a")
        assert trees.numbers(upload.tree) == P
        assert trees.numbers(message.tree) == download
        states, _ = simulate(METHOD, [("a",)], states)


def test_a_round_in_which_nobody_takes_part_changes_no_adapter():
    states, _ = simulate(METHOD, [("a",), ()])
    before = states["server"]
    states, _ = simulate(METHOD, [()], states)
    assert same(states["server"].adapter, before.adapter)
    assert states["server"].rounds == before.rounds + 1


# Fusion.


@pytest.fixture(scope="module")
def trained():
    states, _ = simulate(METHOD, [CLIENTS] * 3)
    return states


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.9), (-0.4, 1.2)])
def test_a_fused_product_has_four_terms(trained, weights):
    w1, w2 = weights
    serving = served(METHOD, trained, "a", finds(*weights))["a"]
    own, common = trained["clients/a"].individual, trained["server"].adapter
    ours = products(serving.tree, FUSED)
    for site in SITES:
        a1, b1 = (own[Name(site, INDIVIDUAL, factor)].double() for factor in "AB")
        a2, b2 = (common[Name(site, SHARED, factor)].double() for factor in "AB")
        terms = w1**2 * b1 @ a1 + w2**2 * b2 @ a2 + w1 * w2 * (b1 @ a2 + b2 @ a1)
        torch.testing.assert_close(ours[site], terms, rtol=0, atol=1e-6)
        two_adapters = w1 * b1 @ a1 + w2 * b2 @ a2
        assert (ours[site] - two_adapters).abs().max() > 1e-2
    assert serving.plan.slots[0].alpha == LORA.alpha


def test_weights_1_0_serve_the_individual_adapter_and_0_1_the_global_one(trained):
    for weights, adapter, slot in (
        ((1.0, 0.0), trained["clients/a"].individual, INDIVIDUAL),
        ((0.0, 1.0), trained["server"].adapter, SHARED),
    ):
        tree = served(METHOD, trained, "a", finds(*weights))["a"].tree
        assert same(select(tree, FUSED), move(adapter, slot, FUSED))


def test_a_head_is_never_weighed(trained):
    tree = served(METHOD, trained, "a", finds(0.0, 0.0))["a"].tree
    head = trained["clients/a"].head
    assert head
    assert all(torch.equal(tree[name], head[name]) for name in head)
    assert not any(tensor.any() for tensor in select(tree, FUSED).values())


@pytest.mark.parametrize("w1", [0.5, 0.2, -0.3, 1.4])
def test_two_equal_adapters_fuse_to_themselves_where_the_weights_sum_to_one(w1):
    states, _ = simulate(METHOD, [("a",)])  # the seed of one client: both adapters are equal
    tree = served(METHOD, states, "a", finds(w1, 1 - w1))["a"].tree
    ours, common = products(tree, FUSED), products(states["server"].adapter, SHARED)
    for site in SITES:
        torch.testing.assert_close(ours[site], common[site], rtol=0, atol=1e-6)


def test_who_has_not_been_trained_serves_the_global_adapter_without_a_search(trained):
    def refuses(client_id, number, order):
        raise AssertionError(f"{client_id} ordered {order}")

    serving = served(METHOD, trained, ["new"], refuses)["new"]
    assert same(select(serving.tree, SHARED), trained["server"].adapter)


# The real engine on a tiny Llama.


@pytest.fixture(scope="module")
def prepared(tiny_model_dir, clients_dir):
    """Clients with 12 train examples, 2 of them for validation; batches of 4."""
    return prepare(settings_for(tiny_model_dir, clients_dir))


@pytest.fixture(scope="module")
def trainer(prepared):
    return trainer_of(prepared)


def rounds_of(method, prepared, count, states=None):
    """Real rounds of clients a and b: states, orders and answers."""
    states = MemoryStates() if states is None else states
    trainer, watch = trainer_of(prepared), Watch()
    for round_ in range(count):
        watch.carry_out = partial(carried_out, trainer, round_)
        run_groups(method, prepared.parts.init, states, ["ab"], one_by_one(watch))
    return states, watch


def carried_out(trainer, round_, client_id, number, order):
    (answer,) = trainer.execute([(client_id, number, order)], when=round_, states=MemoryStates())
    return answer


def search_of(method, prepared, seed=0):
    """The search that a client with two random adapters orders."""
    init, stream = prepared.parts.init, torch.Generator().manual_seed(seed)

    def drawn(slot):
        adapter = init.adapter(method.lora.slot(slot))
        return trees.apply(lambda like: torch.randn(like.shape, generator=stream) * 0.3, adapter)

    client = Client(drawn(INDIVIDUAL), {}, started=True)
    return next(method.deploy(client, Message(drawn(SHARED))))


def objective(trainer, order, numbers):
    """What the search minimises, computed anew."""
    every = trainer.task.examples("a", "train")
    examples = [every[at] for at in trainer._spared("a", order.spare, order.most)]
    serving = Serving(order.plan, order.tree_of(numbers))
    scores = score(trainer.base, serving, examples, Scoring(batch_size=32, generate=False))
    return scores.metrics["loss"] + 0.05 * sum(abs(number) for number in numbers)


@pytest.mark.parametrize("evaluations", [1, 2, 7, 30])
def test_a_search_is_never_worse_than_its_start_and_says_how_good_it_is(
    prepared, trainer, evaluations
):
    method = replace(METHOD, evaluations=evaluations, spare=0.3)
    order = search_of(method, prepared)
    looks = []

    def counted(numbers):
        looks.append(numbers)
        return order.tree_of(numbers)

    found = carried_out(trainer, "test", "a", 0, replace(order, tree_of=counted))
    assert len(looks) <= evaluations
    at_the_start = objective(trainer, order, MIDDLE)
    assert found.objective <= at_the_start + 1e-6
    assert found.objective == pytest.approx(objective(trainer, order, found.numbers), abs=1e-5)
    assert all(abs(number) <= method.bound for number in found.numbers)
    if evaluations == 1:
        assert found.numbers == MIDDLE
    if evaluations == 30:
        assert found.objective < at_the_start - 0.01


def test_where_weights_cost_much_a_search_ends_at_the_base_model(prepared, trainer):
    method = replace(METHOD, l1=1e4, evaluations=200)
    found = carried_out(trainer, "test", "a", 0, search_of(method, prepared))
    assert max(abs(number) for number in found.numbers) < 1e-3


def test_after_training_a_search_finds_what_no_grid_of_weights_betters(prepared, trainer):
    method = replace(METHOD, spare=0.3, evaluations=100)
    states, _ = rounds_of(method, prepared, 8)
    message = Message(states["server"].adapter)
    order = next(method.deploy(states["clients/a"], message))
    found = carried_out(trainer, "test", "a", 0, order)
    grid = [-1.5 + 0.5 * step for step in range(7)]
    best = min(objective(trainer, order, pair) for pair in product(grid, grid))
    assert found.objective < best


def test_a_text_that_is_there_twice_is_spared_once(trainer):
    """The ledger of privacy counts so many examples as are left, and no fewer are trained on."""

    class Twice:
        def examples(self, client_id, split):
            return trainer.task.examples(client_id, split) * 2

    twice = replace(trainer, task=Twice())
    order = Fit(METHOD.lora.plan(SHARED), {}, frozenset(), spare=0.3)
    count = len(Twice().examples("a", "train"))
    fit = twice._client_fit("a", 0, 0, order, None)
    assert len(fit.share.examples) == count - int(0.3 * count)


def test_the_spared_examples_are_searched_on_and_never_trained_on(prepared, trainer, monkeypatch):
    fitted, searched = [], []
    train, scores = engine.train_together, engine.score

    def spy_train(base, shares, *rest):
        fitted.extend({each.ids for each in share.examples} for share in shares)
        return train(base, shares, *rest)

    def spy_score(base, serving, examples, scoring):
        searched.append({each.ids for each in examples})
        return scores(base, serving, examples, scoring)

    monkeypatch.setattr(engine, "train_together", spy_train)
    monkeypatch.setattr(engine, "score", spy_score)
    method = replace(METHOD, spare=0.3, evaluations=2)
    states, watch = rounds_of(method, prepared, 3)
    fits = watch.orders["a"]
    assert fitted[0::2] == fitted[0:1] * 3  # a's and b's in turn: stage 1, then 2
    served(method, states, "a", partial(carried_out, trainer, "deploy"))
    everything = {each.ids for each in trainer.task.examples("a", "train")}
    assert [fit.spare for fit in fits] == [0.3] * 3
    assert searched == searched[:1] * 2
    assert len(searched[0]) == 3
    assert searched[0].isdisjoint(fitted[0])
    assert searched[0] | fitted[0] == everything
    for held_out in ("validation", "test"):
        assert searched[0].isdisjoint(each.ids for each in trainer.task.examples("a", held_out))


def test_adamw_goes_on_with_its_moments_from_round_to_round(prepared):
    method = replace(METHOD, carry_inner=True, sync_every=5)
    states, watch = rounds_of(method, prepared, 3)
    first, second, third = watch.orders["a"]
    assert first.moments is None  # stage 1 is another adapter's
    assert second.moments == Moments()
    after = [answer.moments for answer in watch.answers["a"]]
    steps = 3  # 9 examples in batches of 4
    assert [each.steps for each in after] == [0, steps, 2 * steps]
    assert same(third.moments.first, after[1].first)
    assert same(third.moments.second, after[1].second)
    assert same(states["clients/a"].moments.first, after[2].first)
    assert after[2].first.keys() == third.descending
    anew, _ = rounds_of(replace(method, carry_inner=False), prepared, 3)
    assert anew["clients/a"].moments == Moments()
    assert same(anew["clients/a"].individual, states["clients/a"].individual)  # of stage 1
    assert not same(anew["server"].adapter, states["server"].adapter)


def test_without_carrying_two_stage_2_rounds_differ_from_the_second_on(prepared):
    kept, _ = rounds_of(METHOD, prepared, 2)
    anew, _ = rounds_of(replace(METHOD, carry_inner=False), prepared, 2)
    assert same(kept["server"].adapter, anew["server"].adapter)


def test_states_with_moments_go_through_the_codec_unharmed(prepared, trainer):
    in_memory, _ = rounds_of(METHOD, prepared, 3)
    in_bytes, _ = rounds_of(METHOD, prepared, 3, ByteStates())
    ours, theirs = in_memory["clients/a"], in_bytes.get("clients/a", Client)
    assert ours.moments.steps == theirs.moments.steps > 0
    assert same(ours.moments.second, theirs.moments.second)
    search = partial(carried_out, trainer, "deploy")
    left, right = (served(METHOD, states, "ab", search) for states in (in_memory, in_bytes))
    assert_same_servings(left, right)


# Whole runs.


def test_a_run_by_the_command_line_scores_every_client(run_flags, tmp_path):
    run = tmp_path / "run"
    assert (
        call("run", *run_flags, "--method", "fdlora", "--rounds", 2, "--out", run, "--quiet") == 0
    )
    tested = [line for line in scores_of(run) if line.get("split") == "test"]
    for column in ("own", "shared", "local"):
        of_column = [line for line in tested if line.get("column") == column]
        assert {line["client"] for line in of_column} == {"a", "b", "c"}
    assert is_finished(run)


@dataclass(frozen=True)
class StopsIn:
    """Interrupts a run at the first step of a client in a round."""

    round: int
    client_id: str

    def on_event(self, event):
        if (event.what, event.round, event.client_id) == ("train", self.round, self.client_id):
            raise KeyboardInterrupt

    def on_record(self, line):
        pass


def test_a_run_interrupted_between_and_amid_rounds_goes_on_with_the_same_moments(
    tiny_model_dir, clients_dir, tmp_path
):
    table = {
        "method": {"name": "fdlora", "sync_every": 1, "evaluations": 3},
        "rounds": {"rounds": 3},
    }
    prepared = prepare(settings_for(tiny_model_dir, clients_dir, **table))
    straight, run = tmp_path / "straight", tmp_path / "run"
    start_run(prepared, straight)
    for client_id, begin in (("a", start_run), ("c", resume_run)):
        with pytest.raises(KeyboardInterrupt):
            begin(prepared, run, StopsIn(2, client_id))
    resume_run(reopen(run), run)
    last = read(Client, run / "clients" / "a" / "0002.safetensors")
    assert last.moments.steps > 0
    assert adapters_of(run) == adapters_of(straight)
    assert scores_of(run) == scores_of(straight)
