"""The table of a run or of several, with numbers one can check by hand."""

import csv
import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from fedalt.report.table import (
    describe,
    draw,
    joined,
    run_table,
    scores_of,
    to_csv,
    to_json,
    to_markdown,
    verdict,
)


def score(client: str, column: str, round_: int = 4, split: str = "test", **metrics: float) -> Any:
    return {
        "kind": "score",
        "split": split,
        "round": round_,
        "client": client,
        "column": column,
        "metrics": metrics,
    }


LINES = [
    score("a", "own", loss=1.0, accuracy=0.5, rougeL=10.0),
    score("a", "shared", loss=2.0, accuracy=0.25, rougeL=5.0),
    score("b", "own", loss=3.0, rougeL=40.0),
    score("b", "shared", loss=3.5, rougeL=30.0),
    score("a", "local", 3, loss=1.5, accuracy=0.75, rougeL=9.0),
    score("b", "local", 3, loss=4.0, rougeL=20.0),
    score("a", "own", split="validation", loss=9.0),
]


def test_a_client_is_scored_by_accuracy_where_it_has_one_and_by_rouge_elsewhere():
    table = run_table(LINES)
    assert [(row.name, row.metric) for row in table.clients] == [
        ("a", "accuracy %"),
        ("b", "ROUGE-L"),
    ]
    assert table.columns == ("own", "shared", "local")
    assert table.clients[0].scores == ((50.0,), (25.0,), (75.0,))
    assert table.clients[1].scores == ((40.0,), (30.0,), (20.0,))


def test_gain_is_own_over_local_and_mean_and_worst_are_over_clients():
    table = run_table(LINES)
    assert [row.gain for row in table.clients] == [(-25.0,), (20.0,)]
    assert (table.mean.scores, table.mean.gain) == (((45.0,), (27.5,), (47.5,)), (-2.5,))
    assert (table.worst.scores, table.worst.gain) == (((40.0,), (25.0,), (20.0,)), (-25.0,))


def test_of_losses_the_highest_is_the_worst_and_a_lower_one_is_a_gain():
    table = run_table(LINES, losses=True)
    assert table.of_losses
    assert table.clients[0].scores == ((1.0,), (2.0,), (1.5,))
    assert [row.gain for row in table.clients] == [(0.5,), (1.0,)]
    assert table.worst.scores == ((3.0,), (3.5,), (4.0,))
    assert table.worst.gain == (0.5,)


def test_where_a_client_has_nothing_but_a_loss_the_table_is_one_of_losses():
    table = run_table([*LINES, score("c", "own", loss=5.0), score("c", "local", loss=6.0)])
    assert table.of_losses
    assert table.clients[2].scores == ((5.0,), (), (6.0,))
    assert table.mean.scores == ((3.0,), (), pytest.approx((11.5 / 3,)))


def test_without_a_baseline_there_is_no_gain():
    table = run_table([line for line in LINES if line["column"] != "local"])
    assert table.baseline is None
    assert table.mean.gain == ()
    assert "gain" not in to_markdown(table)


def test_the_last_line_of_a_client_counts():
    again = score("a", "own", 9, loss=0.5, accuracy=1.0, rougeL=1.0)
    assert run_table([*LINES, again]).clients[0].scores[0] == (100.0,)


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="nothing has been scored"):
        run_table([])


def seeds(*accuracies: float) -> list[dict[str, dict[str, float]]]:
    return [{"a": {"accuracy": each / 100, "loss": 1.0}} for each in accuracies]


def test_over_seeds_a_cell_is_the_mean_with_the_standard_deviation():
    table = joined({"X": seeds(60, 70), "local": seeds(50, 52)}, "local")
    assert table.seeds == 2
    assert table.clients[0].scores == ((60.0, 70.0), (50.0, 52.0))
    assert table.clients[0].gain == (10.0, 18.0)
    row = to_markdown(table).splitlines()[2]
    assert row == "| a | accuracy % | 65.0 ± 7.1 | 51.0 ± 1.4 | +14.0 ± 5.7 |"


def test_a_seed_without_a_client_leaves_the_cell_empty():
    table = joined({"X": [seeds(60)[0], {}], "local": seeds(50, 52)}, "local")
    assert table.clients[0].scores[0] == ()
    assert "–" in to_markdown(table)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ((60, 62), "ahead by 10.0, beyond the spread"),
        ((40, 42), "behind by 10.0, beyond the spread"),
        ((52, 54), "+2.0, within the spread"),
        ((40, 82), "within the spread"),
    ],
)
def test_a_lead_counts_when_it_is_larger_than_both_spreads_together(ours, said):
    table = joined({"X": seeds(*ours), "Y": seeds(50, 52)})
    assert said in verdict(table, "X", "Y")


def test_one_seed_says_nothing_about_the_spread():
    table = joined({"X": seeds(60), "Y": seeds(50)})
    assert "a difference of +10.0; one seed tells nothing" in verdict(table, "X", "Y")


def test_a_lower_loss_is_ahead():
    table = joined({"X": [{"a": {"loss": 1.0}}], "Y": [{"a": {"loss": 2.0}}]}, metric="loss")
    assert "a difference of +1.0" in verdict(table, "X", "Y")


def test_json_holds_the_numbers_unrounded():
    shown = json.loads(json.dumps(to_json(run_table(LINES))))
    assert shown["clients"]["a"] == {
        "metric": "accuracy %",
        "scores": {"own": 50.0, "shared": 25.0, "local": 75.0},
        "gain": -25.0,
    }
    assert shown["mean"]["scores"]["shared"] == 27.5
    many = to_json(joined({"X": seeds(60, 70)}))
    assert many["clients"]["a"]["scores"] == {"X": [60.0, 70.0]}
    assert many["clients"]["a"]["gain"] is None


def test_csv_has_one_number_per_line():
    rows = list(csv.DictReader(io.StringIO(to_csv(joined({"X": seeds(60, 70)}), [4, 5]))))
    assert rows[1] == {
        "client": "a",
        "column": "X",
        "metric": "accuracy %",
        "seed": "5",
        "value": "70.0",
    }
    assert len(rows) == 2


def test_the_drawing_shows_every_row_and_marks_the_best():
    out = Console(width=100, file=io.StringIO(), record=True)
    out.print(draw(run_table(LINES), "a run"))
    text = out.export_text(clear=False)
    for word in ("a run", "gain over local", "mean", "worst client", "75.0", "+20.0"):
        assert word in text
    assert re.search(r"\x1b\[1m *75\.0", out.export_text(styles=True))


def test_sentences_tell_the_rounds_and_what_a_round_sends():
    train = {"kind": "train", "column": "own", "upload_bytes": 2500, "download_bytes": 0}
    said = describe([*LINES, train, {**train, "upload_bytes": 1500}])
    assert said == [
        "scored on test data: own after round 5, shared after round 5, local after round 4",
        "a client uploads 2.0 kB and downloads 0 bytes per round (mean)",
    ]


def test_scores_of_a_column_by_client():
    assert scores_of(LINES, "own", "validation") == {"a": {"loss": 9.0}}
