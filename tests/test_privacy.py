"""Privacy of clients: bounded changes, noise that stays in the sum, and who is refused."""

import math
import tomllib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from federation import START, ByteStates, one_by_one, pull, run_groups, simulate

from fedalt.core import tree as trees
from fedalt.core.declared import SettingsError
from fedalt.core.noise import Randomness
from fedalt.core.upload_settings import Privacy
from fedalt.engine.privacy import CarriedNoise, Protection, Release, hold_back
from fedalt.engine.privacy_checks import adds_up, faults, fits_of
from fedalt.engine.states import client_of, server_of
from fedalt.methods import METHODS
from fedalt.methods.fedalt import rest_of_world
from fedalt.methods.fedalt_ablations import FedALTAblations
from fedalt.methods.fedit import FedIT
from fedalt.runs.settings import settings_of, to_toml
from fedalt.training.orders import look_at

ADMITTED = [
    name for name, method in METHODS.items() if method.averages or name == "fedalt"
]  # FedALT's total is found by trying it out, see below
COHORTS = (("a", "b", "c"), ("a", "b"), ("b", "c"), ("a", "b", "c"))
HUGE = 1e9


def played(method, cohorts, *, clip, noise=0.0, seed=0, train=pull):
    """Rounds with privacy of clients; the states, and the server after each round."""
    states, servers = ByteStates(), []
    protection = Protection(Privacy(unit="client", noise=noise, clip=clip))
    for number, cohort in enumerate(cohorts):
        randomness = Randomness(seed, number)
        release = Release(states, noise * clip, randomness, carries=not method.averages)
        groups = [sorted(cohort)]
        execute = one_by_one(train)
        run_groups(method, START, states, groups, execute, protection=protection, release=release)
        servers.append(server_of(method, START, states))
    return states, servers


def flat(tree):
    return torch.cat([tree[name].double().flatten() for name in sorted(tree)])


def restless(client_id, number, order):
    """Training that goes somewhere else every time, by random steps of about 1 a number."""
    fitted = pull(client_id, number, order)
    moved = {name: order.tree[name] + torch.randn(order.tree[name].shape) for name in order.train}
    return type(fitted)(trees.replace(order.tree, moved), fitted.examples, fitted.moments)


@pytest.mark.parametrize("name", ADMITTED)
def test_without_noise_and_limit_a_run_is_the_plain_one_bit_for_bit(name):
    method = METHODS[name]
    plain, _ = simulate(method, COHORTS, ByteStates())
    private, _ = played(method, COHORTS, clip=HUGE)
    assert private.keys() - plain.keys() <= {f"noise/{who}" for who in "abc"}
    for who in "abc":
        left, right = (client_of(method, START, states, who) for states in (plain, private))
        assert repr(left) == repr(right)
    assert plain["server"][0] == private["server"][0]


@pytest.mark.parametrize("name", ADMITTED)
def test_an_upload_moves_by_clip_at_most(monkeypatch, name):
    from fedalt.engine.uploads import UploadStore

    method, moved = METHODS[name], []
    spool = UploadStore.spool

    def look(self, upload, message, data):
        if message.tree:
            moved.append(float((flat(message.tree) - before(upload.client_id)).norm()))
        spool(self, upload, message, data)

    def before(client_id):
        from fedalt.engine.dry_run import play

        client = client_of(method, START, unchanged, client_id)
        sent = method.broadcast(server_of(method, START, unchanged), client_id)
        return flat(play(method.local(client, sent), START, examples=1)[1].tree)

    unchanged = ByteStates()
    monkeypatch.setattr(UploadStore, "spool", look)
    played(method, COHORTS[:1], clip=0.05)
    assert len(moved) == 3
    assert all(norm <= 0.05 for norm in moved)
    assert max(moved) > 0.0499


def test_what_a_fedalt_client_subtracts_is_what_it_uploaded():
    method = METHODS["fedalt"]
    states, servers = played(method, COHORTS, clip=0.3, train=restless)
    server = servers[-1]
    for who in "abc":
        client = client_of(method, START, states, who)
        latest = server.latest[who].tree
        assert trees.equal(client.individual, latest)
        others = [server.latest[other].tree for other in "abc" if other != who]
        message = method.broadcast(server, who)
        row = rest_of_world(client.individual, client.weight, message)
        wanted = (flat(others[0]) + flat(others[1])) / 2
        torch.testing.assert_close(flat(row), wanted, rtol=0, atol=1e-6)


def test_noise_of_every_round_stays_in_fedalts_total():
    """T_t - sum of what clients uploaded is the sum of all rounds' noise, fresh ones each time."""
    method, clip, noise, rounds = METHODS["fedalt"], 0.5, 4.0, 80
    cohorts = [("a", "b", "c") if at % 2 else ("b", "c") for at in range(rounds)]
    states, servers = played(method, cohorts, clip=clip, noise=noise, train=restless, seed=None)
    clients = {who: client_of(method, START, states, who).individual for who in "abc"}
    total = flat(servers[-1].total)
    rest = total - sum(map(flat, clients.values()))
    deviation = noise * clip
    assert float(rest.std()) == pytest.approx(deviation * math.sqrt(rounds), rel=0.25)
    draws = []
    for before, after in pairwise(servers):
        draws.append(flat(after.total) - flat(before.total))
    steps = torch.cat(draws[1:])  # a's first upload brings its start into the total
    assert steps.numel() > 10_000
    # What clients change is at most clip a client over all numbers: nothing beside the noise.
    assert float(steps.std()) == pytest.approx(deviation, rel=0.05)
    apart = torch.stack(draws[1:])
    assert abs(float((apart[1:] * apart[:-1]).mean())) < 0.05 * deviation**2
    carriers = [key for key in states if key.startswith("noise/")]
    carried = sum(
        flat(kept.tree) for key in carriers if (kept := states.get(key, CarriedNoise)).tree
    )
    torch.testing.assert_close(carried, rest, rtol=0, atol=1e-3)


def test_noise_of_a_mean_is_that_of_the_sum_over_the_uploads():
    method = METHODS["fedit"]
    silent, _ = played(method, COHORTS[:1], clip=0.5)
    plain = flat(server_of(method, START, silent).adapter)
    noisy = []
    for _ in range(80):
        states, _ = played(method, COHORTS[:1], clip=0.5, noise=3.0, seed=None)
        noisy.append(flat(server_of(method, START, states).adapter) - plain)
    drawn = torch.cat(noisy)
    assert drawn.numel() > 10_000
    assert float(drawn.std()) == pytest.approx(3.0 * 0.5 / 3, rel=0.04)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02)


def test_a_tree_is_held_back_over_all_its_tensors():
    from fedalt.core.tree import Name

    a, b, c = (Name("s", "own", factor) for factor in "ABG")
    before = {a: torch.tensor([1.0]), b: torch.tensor([0.0])}
    after = {a: torch.tensor([4.0]), b: torch.tensor([4.0]), c: torch.tensor([9.0])}
    held = hold_back(after, before, 1.0)
    assert held[c] is after[c]
    torch.testing.assert_close(held[a], torch.tensor([1 + 0.6 * 0.999]))
    torch.testing.assert_close(held[b], torch.tensor([0.8 * 0.999]))
    assert hold_back(after, before, 5.0) is after


@pytest.mark.parametrize("name", METHODS)
def test_of_all_methods_only_fedalt_sends_a_sum(name):
    assert adds_up(METHODS[name]) == (name == "fedalt")


def test_what_begins_from_a_broadcast_is_not_bounded_by_a_clip():
    """A shared mixer is the mean that came, so that its entry in the total moves by two clips."""
    by_client = Privacy(unit="client", noise=1.0, clip=1.0)
    shared = FedALTAblations(share_mixer=True)
    assert adds_up(shared)
    assert list(faults(METHODS["fedalt"], by_client, 5)) == []
    assert list(faults(METHODS["fedit"], by_client, 5)) == []  # whose mean moves by a clip's share
    (reason,) = faults(shared, by_client, 5)
    assert reason == "a part of an upload begins from what the server sent, which no clip bounds"


def test_a_stage_that_begins_late_is_found_before_the_first_round():
    late = replace(METHODS["hilora"], root_rounds=8)
    assert fits_of(late, 8).count == 1
    with pytest.raises(ValueError, match="penalty"):
        fits_of(late, 10)


def test_what_clients_train_in_a_round_is_found_by_playing():
    assert fits_of(METHODS["fedalt"], 4).count == 1
    assert fits_of(METHODS["feddpa"], 1).count == 1
    assert fits_of(METHODS["feddpa"], 2).count == 2
    assert fits_of(METHODS["fdlora"], 3).spare == 0.05
    with pytest.raises(ValueError, match="a step of its own"):
        fits_of(METHODS["pf2lora"], 2)


def test_what_else_a_client_asks_its_data_may_shape_nothing_that_it_sends():
    reason = "depends on more of a client's texts than their gradients"
    with pytest.raises(ValueError, match=reason):
        fits_of(METHODS["ifca_lora"], 2)  # the group that fits best, without noise
    assert fits_of(replace(METHODS["ifca_lora"], groups=1), 2).count == 1  # which looks at nothing
    for name in set(METHODS) - {"ifca_lora", "pf2lora", "hilora"}:
        assert fits_of(METHODS[name], 6).count >= 1


def test_nor_what_it_trains():
    """The noise of a fit hides the texts in its gradients, not a tensor that was chosen before."""

    class Chosen(FedIT):
        def local(self, client, message):
            found = yield look_at(self.lora.plan("shared"), message.tree)
            steps = super().local(client, message)
            fit = next(steps)
            factor = 1 + found.objective**2
            frozen = replace(fit, compose=lambda tree: {n: t * factor for n, t in tree.items()})
            try:
                steps.send((yield frozen))
            except StopIteration as end:
                return end.value

    with pytest.raises(ValueError, match="more of a client's texts than their gradients"):
        fits_of(Chosen(), 2)


GOOD = {"unit": "client", "epsilon": 8.0, "clip": 1.0}


def settings(privacy, **sections):
    table = {"data": {"path": "/data"}, "rounds": {"select": "last"}, "privacy": privacy}
    for section, values in sections.items():
        table[section] = {**table.get(section, {}), **values}
    return settings_of(table, "a.toml")


def test_a_good_section_is_taken():
    assert settings(GOOD).privacy.delta == 1e-5
    example = {"unit": "example", "noise": 1.0, "clip": 0.5, "delta": 1e-6}
    assert settings(example, rounds={"select": "best"}).privacy.noise == 1.0
    assert settings({}).privacy.unit is None
    assert "[privacy]" not in to_toml(settings({}))
    assert settings_of(tomllib.loads(to_toml(settings(GOOD))), "again") == settings(GOOD)


@pytest.mark.parametrize(
    ("privacy", "others", "says"),
    [
        ({"epsilon": 1.0}, {}, "epsilon is given without unit"),
        ({"unit": "client", "epsilon": 1.0}, {}, "clip is missing"),
        ({"unit": "client", "clip": 1.0}, {}, "exactly one is expected, but neither is"),
        ({**GOOD, "noise": 1.0}, {}, "exactly one is expected, but both are given"),
        ({**GOOD, "epsilon": 0.0}, {}, "epsilon=0.0, but it must be above 0"),
        ({**GOOD, "delta": 1.0}, {}, "delta=1.0, but it"),
        ({**GOOD, "unit": "round"}, {}, "unit: expected one of 'client', 'example'"),
        (GOOD, {"rounds": {"select": "best"}}, "chooses by validation losses"),
        (GOOD, {"rounds": {"robust": "median"}, "method": {"name": "fedit"}}, "is no sum"),
        (GOOD, {"firewall": {"norm_limit": 3.0}}, "clip bounds every upload already"),
        (GOOD, {"method": {"name": "fedlease"}}, "'fedlease': its server does more with uploads"),
        (GOOD, {"method": {"name": "flexlora"}}, "'flexlora': its server does more with uploads"),
        (GOOD, {"method": {"name": "local"}}, "'local' sends nothing"),
        (GOOD, {"method": {"name": "fedit", "weighting": "examples"}}, "weighting = \"uniform\""),
        ({"quantile": 0.5}, {}, "quantile is given without unit"),
        ({**GOOD, "quantile": 1.0}, {}, "quantile=1.0, but it"),
        ({**GOOD, "unit": "example", "quantile": 0.5}, {}, 'it needs unit = "client"'),
        ({**GOOD, "quantile": 0.5, "secure_sum": True}, {}, "leave out one of them"),
        ({**GOOD, "unit": "example"}, {"method": {"name": "pf2lora"}}, "a step of its own"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_sentence(privacy, others, says):
    with pytest.raises(SettingsError) as error:
        settings(privacy, **others)
    assert says in str(error.value)
    assert str(error.value).startswith("a.toml: [privacy]")
    assert "\n" not in str(error.value)
