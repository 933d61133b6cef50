"""Equal steps: what methods train beyond one fit a round, and the rounds that they pay for it."""

import pytest

from fedalt.methods import METHODS
from fedalt.report.costs import steps_told
from fedalt.runs.cells import Cost
from fedalt.runs.lifecycle import start_run
from fedalt.runs.settings import SettingsError, settings_of
from fedalt.runs.setup import prepare
from fedalt.runs.steps import passes_of, with_equal_steps
from fedalt.runs.summary import effort_of
from fedalt.runs.view import View, view_of


def rounds_of(method, rounds=10, epochs=1, participation=1.0):
    table = {
        "data": {"path": "/nowhere"},
        "method": method,
        "training": {"local_epochs": epochs},
        "rounds": {"rounds": rounds, "participation": participation},
    }
    return with_equal_steps(settings_of(table, "a test")).rounds.rounds


@pytest.mark.parametrize(
    ("method", "rounds"),
    [
        ({"name": "fedalt"}, 10),
        ({"name": "local"}, 10),
        ({"name": "fdlora"}, 10),
        ({"name": "pf2lora"}, 10),
        ({"name": "feddpa"}, 5),  # 1 + 4 * 2 = 9 passes of 10
        ({"name": "feddpa", "schedule": "F"}, 9),  # and one before it serves
        ({"name": "feddpa", "schedule": "F", "tail_epochs": 3}, 7),
        ({"name": "fedlora_optimizer"}, 9),
        ({"name": "fedlora_optimizer", "personal_epochs": 0}, 10),
        ({"name": "flexlora", "ranks": {"zoe": 70}}, 10),
    ],
    ids=str,
)
def test_what_a_method_trains_beyond_one_fit_a_round_is_paid_for_with_rounds(method, rounds):
    assert rounds_of(method) == rounds


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_planned(name):
    passes = list(passes_of(METHODS[name], 3, 2))
    assert len(passes) == 3
    assert passes[0][0] >= 2


def test_epochs_and_participation_count():
    assert rounds_of({"name": "feddpa", "schedule": "F"}, epochs=2) == 9  # its tail has two, too
    assert rounds_of({"name": "fedlora_optimizer"}, epochs=2) == 9  # 9 * 2 + 1 = 19 of 20
    assert rounds_of({"name": "feddpa", "schedule": "F"}, participation=0.5) == 8  # 0.5 * 8 + 1
    assert rounds_of({"name": "fedlora_optimizer"}, rounds=1) == 1  # never none


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [{"name": "feddpa"}, {"name": "feddpa", "schedule": "F"}, {"name": "fedlora_optimizer"}],
    ids=str,
)
def test_the_plan_counts_what_a_real_run_records(method, tiny_model_dir, clients_dir, tmp_path):
    settings = settings_of(
        {
            "data": {"path": str(clients_dir), "max_length": 60, "validation": 0.0},
            "model": {"name": str(tiny_model_dir), "device": "cpu"},
            "method": {**method, "rank": 2},
            "training": {"batch_size": 4},
            "rounds": {"rounds": 2},
            "scoring": {"generate": False},
            "local_baseline": False,
        },
        "a test",
    )
    effort = effort_of(start_run(prepare(settings), tmp_path / "run"), settings)
    passes = list(passes_of(settings.method, 2, 1))
    a_pass = 3  # 12 records in batches of 4
    assert effort.steps == a_pass * sum(in_round for in_round, _ in passes)
    assert effort.serving_steps == a_pass * passes[-1][1]


def costs(**steps):
    return {
        label: [Cost(1, 0.0, 0.0, 0.0, 0, steps=in_rounds, serving_steps=serving)]
        for label, (in_rounds, serving) in steps.items()
    }


def test_a_table_says_whether_steps_are_equal():
    (equal,) = steps_told(costs(x=(9, 1), y=(10, 0)), "equal")
    assert equal == "A client takes 10 optimiser steps with every method, serving included."
    unlike = costs(x=(10, 0), y=(10, 0), z=(18, 1), w=(9, 0))
    (warning,) = steps_told(unlike, "equal")
    assert warning == (
        "Warning: steps are not equal: a client takes 10 in all, serving included, but with "
        "z 19 (+90%), w 9 (-10%)."
    )
    (wanted,) = steps_told(unlike, "rounds")
    assert wanted.startswith("Rounds are equal, steps not: a client takes 10")


def test_a_view_is_checked_when_a_comparison_is_read():
    assert view_of({}, "x") == View("score", "equal")
    assert view_of({"metric": "rouge1", "steps": "rounds"}, "x") == View("rouge1", "rounds")
    with pytest.raises(SettingsError, match="x: metric: expected one of 'score', 'accuracy'"):
        view_of({"metric": "rouge"}, "x")
    with pytest.raises(SettingsError, match="x: steps: expected one of 'equal', 'rounds'"):
        view_of({"steps": "same"}, "x")
