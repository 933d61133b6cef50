"""Tests and intervals of a comparison: by hand, and by simulation of methods that are equal."""

import csv
import io

import numpy as np
import pytest
from scipy.stats import PermutationMethod, wilcoxon

from fedalt.report.compared_figures import ranked
from fedalt.report.comparison import Compared, Results, grid_of, grids_of
from fedalt.report.gaps import Gap, gap_matrix, gaps_csv, gaps_over, holm, interval, p_value
from fedalt.report.grid import grid_markdown
from fedalt.report.table import joined
from fedalt.runs.view import View

CLIENTS = [f"c{number}" for number in range(8)]


def table_of(scores, metric="accuracy"):
    """A table of {method: (clients, seeds)}."""
    names = CLIENTS[: len(next(iter(scores.values())))]
    return joined(
        {
            method: [
                {client: {metric: values[at][seed]} for at, client in enumerate(names)}
                for seed in range(len(values[0]))
            ]
            for method, values in scores.items()
        }
    )


def nobody_is_better(stream, methods, clients, seeds):
    """Scores of methods that do not differ: effects of clients and seeds, and of method by client.

    What a method is worth to one client stays over its seeds, as data and test items do.
    """
    of_clients = stream.normal(0.6, 0.1, (1, clients, 1))
    of_seeds = stream.normal(0.0, 0.02, (1, 1, seeds))
    here = stream.normal(0.0, 0.03, (methods, clients, 1))
    noise = stream.normal(0.0, 0.03, (methods, clients, seeds))
    return of_clients + of_seeds + here + noise


def share_below(gaps):
    """How many of several comparisons, (comparisons, clients), are called significant."""
    return np.mean([p_value(of_clients) < 0.05 for of_clients in gaps])


def test_a_p_value_is_exact_whether_or_not_clients_have_equal_gaps():
    # By counting: with five equal gaps and no others, two of 2^5 choices of signs are as extreme.
    assert p_value([0.1] * 5) == p_value([0.0] * 11 + [0.1] * 5) == 2 / 2**5
    assert p_value([0.0] * 8) == p_value([]) == 1.0
    stream = np.random.default_rng(0)
    for clients in (6, 12, 16, 30):
        gaps = stream.normal(0.2, 1.0, clients)
        assert p_value(gaps) == pytest.approx(wilcoxon(gaps, method="exact").pvalue)
    tied = np.round(stream.normal(0.3, 1.0, 9), 1)
    tied[1] = tied[0]
    every = PermutationMethod(n_resamples=2**9)
    assert p_value(tied) == pytest.approx(wilcoxon(tied, method=every).pvalue)


def test_what_rounding_adds_to_a_mean_over_seeds_is_no_gap():
    # Of 12 questions a client has 0, 5 and 1 right with one method, 5, 1 and 0 with the other.
    one, other = (100 * (np.array(right) / 12) for right in ([0, 5, 1], [5, 1, 0]))
    rounding = (one - other).mean()
    assert rounding != 0
    assert p_value([1.0, 2.0, 3.0, 4.0, 5.0, rounding]) == 2 / 2**5


@pytest.mark.parametrize(("clients", "seeds"), [(8, 1), (8, 3), (8, 10), (16, 3)])
def test_of_two_methods_that_are_equal_fewer_than_six_in_a_hundred_are_told_apart(clients, seeds):
    stream = np.random.default_rng(clients + seeds)
    runs = 3000
    gaps = np.array(
        [np.subtract(*nobody_is_better(stream, 2, clients, seeds)) for _ in range(runs)]
    )
    assert share_below(gaps.mean(2)) < 0.06
    if seeds > 1:  # pairs of client and seed, counted as if each were news
        assert share_below(gaps.reshape(runs, -1)) > 0.08


@pytest.mark.parametrize("methods", [2, 4])
def test_of_methods_that_are_equal_fewer_than_six_in_a_hundred_tables_have_a_bold_mean(methods):
    stream = np.random.default_rng(methods)
    runs, bold = 1000, 0
    for _ in range(runs):
        scores = nobody_is_better(stream, methods, 8, 3)
        grid = grid_of(table_of({f"m{at}": each for at, each in enumerate(scores)}))
        bold += any(cells[-2].bold for cells in grid.rows.values())
    assert bold / runs < 0.06


def test_a_method_that_is_better_for_every_client_is_bold():
    scores = {"x": [[0.5, 0.6]] * 8, "y": [[0.55 + 0.01 * at, 0.66] for at in range(8)]}
    grid = grid_of(table_of(scores))
    assert [grid.rows[each][-2].bold for each in "xy"] == [False, True]


def test_more_seeds_are_not_more_evidence():
    # One gap of each client; told in three seeds it is the same gap, and five clients stay five.
    five = {
        "x": [[0.1 * at] * 3 for at in range(5)],
        "y": [[0.1 * at + 0.05] * 3 for at in range(5)],
    }
    grid = grid_of(table_of(five))
    assert not any(cell.bold for cells in grid.rows.values() for cell in cells)
    (gap,) = gaps_over(table_of(five), "x")
    assert gap.p == pytest.approx(2 / 2**5)
    assert gap.clients == 5


def test_accuracy_and_rouge_are_never_in_one_test():
    def scores(better):
        clients = {f"a{at}": {"accuracy": 0.5 + better * 0.01 * at} for at in range(1, 8)}
        return [{**clients, "r": {"rougeL": 50.0 - 30 * better}}]

    table = joined({"x": scores(0), "y": scores(1)})
    gaps = {gap.family: gap for gap in gaps_over(table, "x")}
    assert gaps.keys() == {"accuracy %", "ROUGE-L"}
    assert gaps["accuracy %"].mean == pytest.approx(4.0)
    assert gaps["accuracy %"].p == pytest.approx(2 / 2**7)
    assert (gaps["ROUGE-L"].clients, gaps["ROUGE-L"].mean) == (1, pytest.approx(-30.0))
    # y leads by accuracy and is behind by ROUGE: nothing says which is the better one.
    assert not any(cell.bold for cells in grid_of(table).rows.values() for cell in cells)


def test_a_lower_loss_is_a_gap_above_zero():
    table = table_of({"x": [[2.0]] * 6, "y": [[1.9 - 0.01 * at] for at in range(6)]}, "loss")
    (gap,) = gaps_over(table, "x")
    assert (gap.family, gap.mean) == ("loss", pytest.approx(0.125))
    assert grid_of(table).rows["y"][-2].bold


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_an_interval_covers_its_mean_is_the_same_every_time_and_knows_constants():
    gaps = np.random.default_rng(0).normal(1.0, 2.0, (12, 3))
    low, high = interval(gaps)
    assert low < gaps.mean() < high
    assert interval(gaps) == (low, high)
    assert interval(gaps, seed=1) != (low, high)
    assert interval(np.full((5, 2), 3.0)) == pytest.approx((3.0, 3.0))


def test_an_interval_counts_what_seeds_have_in_common_for_all_clients():
    # No client differs from another, all that varies are seeds: -1, 0 and 1.
    low, high = interval(np.tile([-1.0, 0.0, 1.0], (50, 1)))
    assert low == pytest.approx(-1.0, abs=0.34)
    assert high == pytest.approx(1.0, abs=0.34)
    # And the other way round: seeds agree, clients do not.
    low, high = interval(np.tile(np.linspace(-1, 1, 50)[:, None], (1, 3)))
    assert (low, high) == pytest.approx((-0.16, 0.16), abs=0.02)  # 1.96 deviations of a mean of 50


def test_clients_that_only_one_method_has_are_left_out_of_gaps():
    few = [{each: {"accuracy": 0.5} for each in CLIENTS[:6]}]
    many = [{each: {"accuracy": 0.6} for each in CLIENTS}]
    table = joined({"few": few, "many": many})
    assert gap_matrix(table.clients, 1, 0).shape == (6, 1)
    assert not any(cell.bold for cells in grid_of(table).rows.values() for cell in cells)


def test_gaps_are_written_unrounded():
    gap = Gap("y", "x", "loss", 8, 1 / 3, 0.1, 0.5, 0.0078125, 0.015625)
    (line,) = csv.DictReader(io.StringIO(gaps_csv([gap])))
    assert float(line["mean"]) == 1 / 3
    assert (line["method"], line["over"], float(line["holm"])) == ("y", "x", 0.015625)


def results_of(scores, view):
    """Results of methods by name; without costs, which no gap needs."""
    entries = [Compared(name, {"method": {"name": name}}, ()) for name in scores]
    return Results(entries, range(2), scores, {}, view)


def test_a_method_without_any_client_of_the_metric_is_never_the_best():
    """Its own data may list no options where the others' do."""
    options, none = {"accuracy": 0.5, "loss": 1.0}, {"loss": 0.5}
    scores = {"fedalt": [{"a": options}] * 2, "fedit": [{"z": none}] * 2}
    results = results_of(scores, View("accuracy"))
    grid = grids_of(results)["scores"]
    assert [cell.seeds for cell in grid.rows["fedit"]] == [(), (), ()]
    assert "gap to the best, fedalt (95 %)" in grid.gaps
    assert ranked(results.tables()["scores"]) == {"fedalt": 50.0}


def both_metrics(accuracy, rouge, loss):
    """Two seeds of two clients, of whom one has options and both have generated texts."""
    first = {"accuracy": accuracy, "rouge1": rouge + 5, "rougeL": rouge, "loss": loss}
    seed = {"a": first, "b": {key: first[key] for key in ("rouge1", "rougeL", "loss")}}
    return [seed, seed]


SCORES = {
    "local": both_metrics(0.5, 30.0, 2.0),
    "fedit": both_metrics(0.6, 20.0, 1.5),
    "fedalt": both_metrics(0.7, 40.0, 1.8),
}


@pytest.mark.parametrize(
    ("metric", "local", "best"),
    [
        ("accuracy", "+20.0 (+20.0 to +20.0)", "gap to the best, fedalt (95 %)"),
        ("rouge1", "+10.0 (+10.0 to +10.0)", "gap to the best, fedalt (95 %)"),
        ("score", "accuracy % +20.0 (+20.0 to +20.0); ROUGE-L +10.0 (+10.0 to +10.0)", None),
    ],
)
def test_a_table_has_the_gap_to_local_only_and_to_the_best_with_their_intervals(
    metric, local, best
):
    grids = grids_of(results_of(SCORES, View(metric)))
    text = grid_markdown(grids["scores"], {}, ())
    head, _, first, second, third = text.splitlines()
    assert best is None or f"| gap to local (95 %) | {best} |" in head
    assert f"| {local} |" in third  # fedalt, over local
    assert third.endswith("| – |")  # the best has no gap to itself
    assert first.split("|")[1].strip() == "local"
    assert second.split("|")[1].strip() == "fedit"
    losses = grid_markdown(grids["losses"], {}, ()).splitlines()
    assert "| gap to local (95 %) | gap to the best, fedit (95 %) |" in losses[0]
    assert losses[4].endswith("| +0.200 (+0.200 to +0.200) | -0.300 (-0.300 to -0.300) |")


def test_a_metric_heads_a_table_of_the_clients_that_have_it():
    accuracy = joined(SCORES, metric="accuracy")
    assert [row.name for row in accuracy.clients] == ["a"]
    assert accuracy.mean.scores[2] == (70.0, 70.0)
    rouge1 = joined(SCORES, metric="rouge1")
    assert [(row.name, row.metric) for row in rouge1.clients] == [
        ("a", "ROUGE-1"),
        ("b", "ROUGE-1"),
    ]
    assert rouge1.mean.scores[0] == (35.0, 35.0)
    assert list(grids_of(results_of(SCORES, View("loss")))) == ["losses"]
    with pytest.raises(ValueError, match="metric = 'rougeL': no client has it with every method"):
        joined({"x": [{"a": {"loss": 1.0}}]}, metric="rougeL")
