"""FlexLoRA, FLoRIST and the owner-only mean, from the first draw to what a client serves."""

from dataclasses import replace

import pytest
import torch
from federation import EXAMPLES, HEADS, SITES, START, MemoryStates, pull, served, simulate

from fedalt.adapters.plan import Slot
from fedalt.core import tree as trees
from fedalt.core.tree import Name
from fedalt.methods import METHODS
from fedalt.methods.contract import Message
from fedalt.methods.fedit import FedIT
from fedalt.methods.lora import Lora
from fedalt.methods.unequal_ranks import SHARED, UnequalRanks
from fedalt.runs.settings import SettingsError, read_settings, settings_of, to_toml

LORA = Lora(rank=2, alpha=4, dropout=0.0)
RANKS = {"a": 1, "b": 3}  # and c has 2
FLEXLORA = UnequalRanks(variant="flexlora", lora=LORA, ranks=RANKS)
FLORIST = UnequalRanks(variant="florist", lora=LORA, ranks=RANKS, tau=0.95)
MEAN = UnequalRanks(variant="owner_mean", lora=LORA, ranks=RANKS)
ALL = [FLEXLORA, FLORIST, MEAN]
SPLITTING = ("flexlora", "florist")
each_method = pytest.mark.parametrize("method", ALL, ids=[each.variant for each in ALL])
SUMS = [
    replace(FLEXLORA, split="balanced"),
    FLEXLORA,
    replace(FLEXLORA, weighting="examples"),
    replace(FLORIST, tau=1.0),
]


def watched(method, cohorts, states=None):
    """A federation's states, and each client's last trained tree."""
    uploads = {}

    def watch(client_id, number, order):
        fitted = pull(client_id, number, order)
        uploads[client_id] = fitted.tree
        return fitted

    return simulate(method, cohorts, states, train=watch)[0], uploads


def product(tree, site):
    a, b = (tree[Name(site, SHARED, factor)].double() for factor in "AB")
    return b @ a


def best(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def close(left, right, tolerance=1e-6):
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@each_method
def test_every_client_has_its_own_rank_and_all_have_one_scaling(method):
    states, uploads = watched(method, [("a", "b", "c")])
    for client, serving in served(method, states, "abc").items():
        (slot,) = serving.plan.slots
        assert slot.rank == {"a": 1, "b": 3, "c": 2}[client]
        assert slot.scaling == LORA.slot(SHARED).scaling == 2
        assert uploads[client].keys() == serving.tree.keys()
        assert all(uploads[client][name].shape == serving.tree[name].shape for name in serving.tree)


@pytest.mark.parametrize("method", [FLEXLORA, FLORIST, *(METHODS[each] for each in SPLITTING)])
def test_the_singular_values_all_go_into_b_unless_they_are_to_be_split(method):
    method = replace(method, lora=LORA)
    states, uploads = watched(method, [("a", "b", "c")])
    halves, _ = watched(replace(method, split="balanced"), [("a", "b", "c")])
    for site in SITES:
        names = [Name(site, SHARED, factor) for factor in "AB"]
        a, b = (states["server"].adapter[name] for name in names)
        s = torch.linalg.svdvals(sum(product(uploads[each], site) for each in "abc") / 3)
        close(a @ a.T, torch.eye(len(a)), 1e-5)
        close(b.norm(dim=0).double(), s[: len(a)], 1e-5)
        a, b = (halves["server"].adapter[name] for name in names)
        close(a.norm(dim=1), b.norm(dim=0), 1e-5)


@each_method
def test_all_clients_begin_with_the_first_rows_of_one_draw(method):
    whole = START.adapter(Slot(SHARED, 3, 1.0))
    for client, rank in (("a", 1), ("b", 3), ("c", 2)):
        for name, tensor in served(method, MemoryStates(), [client])[client].tree.items():
            if name not in HEADS:
                assert torch.equal(
                    tensor, whole[name][:rank] if name.factor == "A" else whole[name][:, :rank]
                )


@pytest.mark.parametrize("method", SUMS, ids=["balanced", "in B", "by examples", "florist, all"])
def test_a_client_gets_the_best_approximation_of_its_rank_of_the_exact_sum(method):
    states, uploads = watched(method, [("a", "b", "c")] * 2)
    weights = EXAMPLES if method.weighting == "examples" else dict.fromkeys(EXAMPLES, 1)
    for serving in served(method, states, "abc").values():
        for site in SITES:
            exact = sum(weights[k] * product(tree, site) for k, tree in uploads.items())
            exact /= sum(weights.values())
            close(product(serving.tree, site), best(exact, serving.plan.slots[0].rank))


def test_a_client_of_enough_rank_gets_the_exact_sum():
    method = replace(FLEXLORA, ranks={**RANKS, "big": 6})
    states, uploads = watched(method, [("a", "b", "c")])
    tree = served(method, states, ["big"])["big"].tree
    for site in SITES:
        exact = sum(product(each, site) for each in uploads.values()) / 3
        close(product(tree, site), exact)


@each_method
def test_rows_that_nobody_gave_the_server_are_as_drawn_and_change_nothing(method):
    states, uploads = watched(method, [("a",)] * 2)  # rank 1
    tree = served(method, states, ["b"])["b"].tree  # rank 3
    drawn = START.adapter(Slot(SHARED, 3, 1.0))
    for site in SITES:
        a, b = Name(site, SHARED, "A"), Name(site, SHARED, "B")
        assert torch.equal(tree[a][1:], drawn[a][1:])
        assert not tree[b][:, 1:].any()
        close(product(tree, site), product(uploads["a"], site))


@pytest.mark.parametrize("method", [FLEXLORA, FLORIST], ids=["flexlora", "florist"])
def test_directions_that_no_client_trained_leave_no_dead_rows(method):
    # All three upload the same, of rank 1 in 3 rows: with A and B both near 0 the other two rows
    # could never train again.
    def same(client_id, number, order):
        fitted = pull("a", number, order)
        tree = dict(fitted.tree)
        for name in order.train:
            if name.slot == SHARED and name.factor == "B":
                tree[name] = tree[name].clone()
                tree[name][:, 1:] = 0
        return replace(fitted, tree=tree)

    states, _ = simulate(
        replace(method, ranks=dict.fromkeys("abc", 3)), [("a", "b", "c")], train=same
    )
    for name, tensor in states["server"].adapter.items():
        assert tensor.shape[0 if name.factor == "A" else 1] == 1
    untrained, _ = simulate(
        method,
        [("a", "b")],
        train=lambda client, number, order: replace(pull(client, number, order), tree=order.tree),
    )
    for client, serving in served(method, untrained, "ab").items():
        assert trees.equal(serving.tree, served(method, MemoryStates(), client)[client].tree)


def test_a_rank_row_of_a_sum_is_another_one_in_the_next_round_and_that_of_a_mean_is_not():
    a, b = torch.eye(2, 5), torch.diag(torch.tensor([1.0, 2.0]))  # the second row is the stronger
    tree = {Name("s", SHARED, "A"): a, Name("s", SHARED, "B"): b}
    for variant, moves in (("flexlora", True), ("florist", True), ("owner_mean", False)):
        method = replace(METHODS[variant], lora=Lora(rank=2))
        server = method.aggregate(method.init_server(START), [("a", Message(tree, {"weight": 1}))])
        first = server.adapter[Name("s", SHARED, "A")][0]
        torch.testing.assert_close(first, a[1] if moves else a[0])
        assert method.renewed == moves


def test_florist_is_flexlora_where_its_threshold_keeps_everything():
    flexlora, _ = simulate(FLEXLORA, [("a", "b", "c"), ("a", "c")])
    florist, _ = simulate(replace(FLORIST, tau=1.0), [("a", "b", "c"), ("a", "c")])
    for client, serving in served(FLEXLORA, flexlora, "abc").items():
        other = served(replace(FLORIST, tau=1.0), florist, client)[client]
        assert serving.plan == other.plan
        assert trees.equal(serving.tree, other.tree)


def test_florist_sends_all_clients_the_same_and_less_of_a_lower_threshold():
    numbers = []
    for tau in (0.3, 0.8, 0.95, 1.0):
        method = replace(FLORIST, tau=tau)
        states, uploads = watched(method, [("a", "b", "c")])
        messages = [method.broadcast(states["server"], client).tree for client in "abc"]
        assert all(trees.equal(message, messages[0]) for message in messages)
        numbers.append(trees.numbers(messages[0]))
        for site in SITES:
            exact = sum(product(each, site) for each in uploads.values()) / 3
            missed = (exact - product(messages[0], site)).square().sum()
            assert missed <= (1 - tau) * exact.square().sum() + 1e-6
    assert numbers == sorted(numbers)
    assert numbers[0] < numbers[-1]


def test_florist_cuts_every_site_for_itself_and_a_client_takes_what_it_has_rows_for():
    def one_site_in_one_direction(client_id, number, order):
        fitted = pull(client_id, number, order)
        tree = dict(fitted.tree)
        name = Name("block.1.q", SHARED, "B")
        tree[name] = torch.ones_like(tree[name])  # of rank 1, whatever A is
        return replace(fitted, tree=tree)

    states, _ = simulate(FLORIST, [("a", "b", "c")], train=one_site_in_one_direction)
    sent = FLORIST.broadcast(states["server"], "a").tree
    assert len(sent[Name("block.1.q", SHARED, "A")]) == 1
    assert len(sent[Name("block.0.q", SHARED, "A")]) > 1
    tree = served(FLORIST, states, "a")["a"].tree
    for site in SITES:
        close(product(tree, site), best(product(sent, site), 1))


def test_of_equal_ranks_the_owner_only_mean_is_fedit():
    cohorts = [("a", "b", "c"), ("a", "c"), ("b", "c")]
    method = replace(MEAN, ranks={}, weighting="examples")
    ours, _ = simulate(method, cohorts)
    fedit, _ = simulate(FedIT(lora=LORA, weighting="examples"), cohorts)
    for name, tensor in fedit["server"].adapter.items():
        close(ours["server"].adapter[name], tensor)


def test_rows_that_nobody_in_the_cohort_owns_stay_as_they_are():
    states, _ = simulate(MEAN, [("a", "b", "c")])
    before = states["server"].adapter
    states, uploads = watched(MEAN, [("a", "c")], states)
    for name, tensor in states["server"].adapter.items():
        rows, old, a, c = (
            each if name.factor == "A" else each.T
            for each in (tensor, before[name], uploads["a"][name], uploads["c"][name])
        )
        close(rows[0], (a[0] + c[0]) / 2)
        close(rows[1], c[1])
        assert torch.equal(rows[2], old[2])


@each_method
def test_message_bytes_are_those_of_the_clients_rank(method):
    _, costs = simulate(method, [("a", "b", "c")] * 2)
    for cost in costs:
        rank = {"a": 1, "b": 3, "c": 2}[cost.client_id]
        numbers = sum(rank * (d_in + d_out) for d_in, d_out in SITES.values())
        assert 0 < cost.upload_bytes - 4 * numbers < 4000
    for first, later in zip(costs[:3], costs[3:], strict=True):
        assert first.download_bytes == 0  # a client draws what it begins with
        assert later.download_bytes > 0
    if method is not FLORIST:
        a, b = (4 * r * sum(d_in + d_out for d_in, d_out in SITES.values()) for r in (1, 3))
        assert abs(costs[4].download_bytes - costs[3].download_bytes - (b - a)) < 100


@each_method
def test_a_table_of_ranks_is_read_and_written_again(tmp_path, method):
    table = {
        "data": {"path": "/d"},
        "method": {"name": method.variant, "rank": 2, "ranks": {"anna": 4, "dr. b": 1}},
    }
    settings = settings_of(table, "test")
    assert settings.method.ranks == {"anna": 4, "dr. b": 1}
    assert settings.method.variant == method.variant
    (tmp_path / "settings.toml").write_text(to_toml(settings))
    assert "[method.ranks]" in to_toml(settings)
    assert read_settings(tmp_path / "settings.toml") == settings
    for wrong, complaint in (({"a": 0}, "'a' has rank 0"), ({"a": "4"}, "a table of names")):
        with pytest.raises(SettingsError, match=complaint):
            settings_of({**table, "method": {"name": method.variant, "ranks": wrong}}, "test")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"variant": "florist", "tau": 0.0}, "tau=0.0"),
        ({"variant": "florist", "tau": 1.5}, "tau=1.5"),
        ({"variant": "owner_mean", "tau": 0.5}, "not of a mean of rows"),
        ({"variant": "owner_mean", "split": "in_b"}, "not of a mean of rows"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        UnequalRanks(**settings)


def test_the_name_that_the_owner_only_mean_had_before_is_an_error_that_says_the_new_one():
    with pytest.raises(
        SettingsError, match=r"no method 'hetlora_mean', .*; it is called owner_mean now"
    ):
        settings_of({"data": {"path": "/d"}, "method": {"name": "hetlora_mean"}}, "test")
