"""The audit with one training run: its bound, its guesses, and what it finds of planted texts."""

import json
import math
from contextlib import nullcontext

import pytest
from commands import call
from scipy.stats import binom

from fedalt.engine.audit import guess, lower_bound, probability
from fedalt.runs import audit as audits
from fedalt.runs.observer import Observers


def test_the_chance_of_right_guesses_is_that_of_coins_of_that_accuracy():
    """By hand: at epsilon log 3 a guess is right 3 times in 4."""
    assert probability(8, 2, 2, math.log(3), 0) == pytest.approx(9 / 16)
    assert probability(8, 2, 1, math.log(3), 0) == pytest.approx(15 / 16)
    assert probability(8, 3, 0, math.log(3), 0) == 1
    assert probability(8, 4, 4, 0, 0) == pytest.approx(1 / 16)


def test_delta_adds_what_the_theorem_says():
    """By hand: W is of two coins of accuracy 3/4, P[W = 1] = 6/16, P[W = 0] = 1/16.

    For two right the largest of 6/16 / 1 and (6/16 + 1/16) / 2 counts, for one right 1/16.
    """
    delta = 1e-3
    two, one = (probability(8, 2, right, math.log(3), delta) for right in (2, 1))
    assert two == pytest.approx(9 / 16 + 2 * 8 * delta * 6 / 16)
    assert one == pytest.approx(15 / 16 + 2 * 8 * delta * 1 / 16)


def test_the_bound_is_where_the_chance_is_the_error_that_was_allowed():
    """All right: accuracy^r = 1/20, so epsilon = log(p / (1 - p)) with p = 0.05^(1/r)."""
    for made in (8, 100):
        accuracy = 0.05 ** (1 / made)
        known = math.log(accuracy / (1 - accuracy))
        assert lower_bound(made, made, made, 0.0) == pytest.approx(known, abs=1e-5)
    bound = lower_bound(200, 100, 80, 1e-5)
    assert probability(200, 100, 80, bound, 1e-5) == pytest.approx(0.05)
    # Without delta it is the usual interval for a binomial's accuracy (Clopper and Pearson).
    low = binom(100, 0.5).sf(79)
    assert low < 0.05
    exact = 1 / (1 + math.exp(-lower_bound(200, 100, 80, 0.0)))
    assert binom.sf(79, 100, exact) == pytest.approx(0.05, rel=1e-4)
    assert bound < lower_bound(200, 100, 80, 0.0)


def test_guesses_as_good_as_chance_show_nothing():
    assert lower_bound(100, 100, 50, 1e-5) == 0
    assert lower_bound(100, 100, 0, 1e-5) == 0
    with pytest.raises(ValueError, match="11 right of 10 guesses"):
        probability(20, 10, 11, 1.0, 0.0)


def test_the_surest_canaries_are_guessed_and_the_others_left_out():
    """32 canaries, of which only the 8 with the largest and the smallest signs tell the truth."""
    signs = list(range(32))
    coins = [at >= 28 if at < 4 or at >= 28 else at % 2 == 0 for at in signs]
    sure = guess(signs, coins, 0.0)
    assert (sure.canaries, sure.made, sure.right) == (32, 8, 8)
    # One of four tries: all right of 8 at an error of 0.05 / 4.
    assert sure.bound == pytest.approx(lower_bound(32, 8, 8, 0.0, 1 - 0.05 / 4))
    assert guess(signs, [at % 2 == 0 for at in signs], 0.0).bound == 0


@pytest.fixture
def small(monkeypatch):
    """An audit of seconds, too short to find anything for sure."""
    monkeypatch.setattr(audits, "CANARIES", 16)
    monkeypatch.setattr(audits, "_ROUNDS", 1)
    monkeypatch.setattr(audits, "_EPOCHS", 1)


def silent(prepared):
    """Nobody watches."""
    return nullcontext(Observers())


def test_a_run_with_noise_keeps_its_claim_and_repeats_with_its_seed(small):
    once, again = (audits.audit(2.0, 3, silent, repeatable=True) for _ in range(2))
    assert once == again
    assert 1.9 < once.claimed <= 2.0
    assert once.kept
    assert once.guesses.canaries == 16


def test_the_command_shows_claim_and_bound_and_fails_where_nothing_is_found(small, capsys):
    """After one step no attack finds texts; the command says so instead of passing."""
    assert call("privacy", "audit", "--seed", "3", "--json") == 1
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert result["passed"] is False
    assert result["runs"]["without noise"]["claimed"] is None
    assert 3.9 < result["runs"]["epsilon 4"]["claimed"] <= 4
    assert "finds nothing even without noise" in told.err


def test_a_budget_that_is_none_is_refused_in_a_sentence(capsys):
    for wrong in ("0", "-1", "inf", "nan"):
        assert call("privacy", "audit", "--epsilon", wrong) == 2
        assert "but a budget is above 0 and finite" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_without_noise_the_canaries_are_found():
    found = audits.audit(None, 1, silent, repeatable=True)
    assert found.claimed == math.inf
    assert found.guesses.right > 0.75 * found.guesses.made
    assert found.guesses.bound > 0.5
