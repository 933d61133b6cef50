"""A clip that follows a quantile: its equations by hand, its noise, and rounds that use it."""

import math

import numpy as np
import pytest
import torch
from federation import START, ByteStates, one_by_one, run_groups
from runs_for_tests import save_model
from test_federation import Wire, place
from test_privacy import restless

from fedalt.core.codec import decode, encode
from fedalt.core.declared import SettingsError
from fedalt.core.noise import Randomness
from fedalt.core.upload_settings import Privacy
from fedalt.engine.adaptive_clip import WITHIN, AdaptiveClip, clip_now
from fedalt.engine.privacy import Protection, Release
from fedalt.engine.states import client_of
from fedalt.federation.messages import NEVER, Answer, Call
from fedalt.methods import METHODS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


QUIET = {"noise": 0.0, "clients": 8, "randomness": Randomness(0)}


def test_the_paper_s_rule_by_hand():
    clip = AdaptiveClip(quantile=0.5, norm=2.0, **QUIET)
    within = [True, False, False, False]  # a quarter of them, and a half is wanted
    assert clip.following(within).norm == pytest.approx(2.0 * math.exp(-0.2 * (0.25 - 0.5)))
    assert clip.following([True, False]).norm == 2.0
    assert clip.following([]).norm == 2.0


@pytest.mark.parametrize("noise", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("clients", [3, 100, 10_000])
def test_sum_and_count_cost_what_the_sum_would_alone(noise, clients):
    """Changes over C, and counts of +-1/2 doubled, are one Gaussian mechanism of sensitivity 1."""
    clip = AdaptiveClip(0.5, 1.0, noise, clients, Randomness(0))
    both = clip.sum_noise**-2 + (2 * clip.count_deviation) ** -2
    assert both == pytest.approx(noise**-2)
    assert clip.sum_noise <= noise / math.sqrt(0.9) * (1 + 1e-12)
    assert clip.count_deviation >= clients / 20
    if clients == 10_000:
        assert clip.count_deviation == 500  # the paper's
    if clients == 3:
        assert clip.sum_noise == pytest.approx(noise / math.sqrt(0.9))


def test_the_clip_finds_the_quantile():
    draws, norm = np.random.default_rng(0), 100.0
    for _ in range(200):
        norms = draws.lognormal(mean=0.0, sigma=1.0, size=100)
        clip = AdaptiveClip(0.8, norm, **QUIET)
        norm = clip.following(list(norms <= norm)).norm
    assert norm == pytest.approx(math.exp(0.8416), rel=0.15)


def test_the_noise_of_the_count():
    clip = AdaptiveClip(0.5, 1.0, 2.0, 4, Randomness(1, "count"))
    within = [True, False, True, False]
    logs = np.log([clip.following(within).norm for _ in range(10_000)])
    deviation = 0.2 * clip.count_deviation / 4
    assert logs.std() == pytest.approx(deviation, rel=0.03)
    assert abs(logs.mean()) < 4 * deviation / 100


@pytest.mark.parametrize("name", ["fedalt", "fedit"])
def test_rounds_clip_at_what_the_rounds_before_have_come_to(name):
    """Changes of `restless` are far above the clip, so it grows by the same factor every round."""
    method, states = METHODS[name], ByteStates()
    privacy = Privacy(unit="client", noise=0.0, clip=0.01, quantile=0.5)
    moved = []
    for number in range(4):
        norm = clip_now(states) or 0.01
        adaptive = AdaptiveClip(0.5, norm, 0.0, 2, Randomness(0))
        release = Release(states, 0.0, Randomness(0), not method.averages, adaptive)
        before = client_of(method, START, states, "a")
        protection = Protection(privacy, norm=norm)
        outcome = run_groups(
            method,
            START,
            states,
            [["a", "b"]],
            one_by_one(restless),
            protection=protection,
            release=release,
        )
        assert [cost.metrics[WITHIN] for cost in outcome.clients] == [0.0, 0.0]
        assert outcome.clip == norm
        assert norm == pytest.approx(0.01 * math.exp(0.2 * 0.5) ** number)
        if name == "fedalt":
            after = client_of(method, START, states, "a").individual
            gaps = [(after[key] - before.individual[key]).flatten() for key in after]
            moved.append(float(torch.cat(gaps).norm()) / norm)
    assert moved == pytest.approx([0.999] * len(moved), rel=1e-3)


def test_a_client_refuses_a_clip_that_the_terms_know_nothing_of(tmp_path, model):
    there, _ = place(tmp_path, model, rounds={"rounds": 2, "select": "last"})
    client = there.member("a")
    method, init = client.parts.arms[0].method, client.parts.init
    message = method.broadcast(method.init_server(init), "a")
    call = Call("letters", there.terms.digest, "a", 0, NEVER, True, message, clip=0.5)
    answer = decode(Answer, client.answer(encode(call)))
    assert answer.error.endswith("a clip of 0.5, expected none")


def test_a_server_that_counts_late_uploads_refuses_a_clip_that_moves(tmp_path, model):
    there, _ = place(
        tmp_path,
        model,
        rounds={"rounds": 2, "select": "last"},
        privacy={"unit": "client", "noise": 1.0, "clip": 0.5, "quantile": 0.5},
    )
    with pytest.raises(SettingsError, match="what this round's noise hides"):
        there.host(Wire({}), late="count")
    server = there.host(Wire({}))
    assert server.rules.late == "drop"
