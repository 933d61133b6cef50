import json
from dataclasses import asdict

import pytest
from data_files import asked, bytewise, write_clients

from fedalt.data.doctor import check
from fedalt.data.folder import open_data
from fedalt.data.prompts import Template
from fedalt.data.records import DataError


def report_on(path, max_length=512, tokenizer=None):
    return check(open_data(path), tokenizer or bytewise(), Template("{instruction}:"), max_length)


def answered(*answers, start=0):
    return [asked(f"q{start + n}", answer) for n, answer in enumerate(answers)]


def test_lengths_and_counts_are_those_of_the_records(tmp_path):
    rows = [asked("q" * n, "yes") for n in range(1, 21)]  # n + 1 tokens, then 3 and the end
    write_clients(tmp_path, a_train=rows, a_test=rows[:2])
    (client,) = report_on(tmp_path).clients
    train = client.splits["train"]
    assert asdict(train.tokens) == {"mean": 15.5, "p50": 15, "p95": 24, "longest": 25}
    assert train.answer_share == pytest.approx(4 * 20 / (15.5 * 20))
    assert {split: part.records for split, part in client.splits.items()} == {
        "train": 20,
        "test": 2,
    }
    assert client.overlap == 2


def test_what_a_maximal_length_takes_is_counted_but_lengths_are_whole(tmp_path):
    write_clients(tmp_path, a_train=[asked("q" * 9, "yes"), asked("q", "y" * 20), asked("q", "")])
    (client,) = report_on(tmp_path, max_length=8).clients
    train = client.splits["train"]
    assert (train.truncated_prompts, train.answers_too_long, train.empty_answers) == (2, 1, 1)
    assert train.tokens.longest == 22
    warnings = "\n".join(report_on(tmp_path, max_length=8).warnings)
    assert "client a: 2 of 3 train records lose a part of their text at max_length=8" in warnings
    assert "client a: 1 of 3 train records lose the end of their answer" in warnings
    assert "client a: 1 of 3 train records have an empty answer" in warnings


def test_a_sorted_file_is_told_from_a_shuffled_one(tmp_path):
    write_clients(
        tmp_path,
        sorted_train=answered(*["no"] * 20, *["yes"] * 20),
        mixed_train=answered(*["no", "yes", "yes", "no"] * 10),
    )
    mixed, ordered = report_on(tmp_path).clients
    assert (ordered.splits["train"].runs, ordered.splits["train"].longest_run) == (2, 20)
    assert ordered.splits["train"].shuffled_runs == 21.0
    assert ordered.splits["train"].looks_sorted
    assert not mixed.splits["train"].looks_sorted
    assert sum("sorted by its answers" in text for text in report_on(tmp_path).warnings) == 1


def test_a_shifted_balance_is_told_from_chance(tmp_path):
    write_clients(
        tmp_path,
        a_train=answered(*["no", "yes"] * 50),
        a_test=answered(*["no", "yes", "yes", "yes"] * 25, start=100),
        b_train=answered(*["no", "yes"] * 5),
        b_test=answered(*["no", "yes", "yes"] * 3, start=100),
    )
    report = report_on(tmp_path)
    assert report.clients[0].distance == pytest.approx(0.25)
    assert report.clients[1].distance == pytest.approx(1 / 6)
    told = [text for text in report.warnings if "how often each answer occurs" in text]
    assert [text.split(":")[0] for text in told] == ["client a"]


def test_an_answer_in_test_alone_is_told(tmp_path):
    write_clients(tmp_path, a_train=answered(*["no"] * 20), a_test=answered("yes", start=50))
    warnings = report_on(tmp_path).warnings
    assert "client a: the answer 'yes' is in test but never in train" in warnings
    assert "client a: every train record has the same answer, 'no'" in warnings


def test_the_balance_of_changing_options_is_that_of_their_positions(tmp_path):
    rows = [asked(f"q\nOPTIONS:\n- a{n}\n- b{n}", f"{'ab'[n % 4 == 0]}{n}") for n in range(40)]
    rows.append(asked("q\nOPTIONS:\n- a\n- b", "c"))
    write_clients(tmp_path, a_train=rows)
    (client,) = report_on(tmp_path).clients
    assert client.balance_of == "position"
    assert client.splits["train"].balance == {"1": 30, "2": 10, "none": 1}
    assert client.splits["train"].off_options == 1
    assert any("not among their options" in text for text in report_on(tmp_path).warnings)


def test_free_text_has_no_balance(tmp_path):
    write_clients(tmp_path, a_train=answered(*(f"text {n}" for n in range(10))))
    (client,) = report_on(tmp_path).clients
    assert (client.balance_of, client.splits["train"].balance, client.distance) == (
        "nothing",
        {},
        None,
    )


def test_repetitions_and_overlaps_are_counted(tmp_path):
    write_clients(
        tmp_path,
        a_train=[asked("q", "x"), asked("q", "x"), asked("r", "x"), asked("s", "x")],
        a_test=[asked(" Q", "X"), asked("s", "x"), asked("r", "y"), asked("t", "z")],
        a_validation=[asked("s ", "x"), asked("t", "Z"), asked("v", "x")],
        b_train=[asked("T", "z"), asked("u", "z")],
        c_train=[asked("t", "z"), asked("q", "x")],
    )
    report = report_on(tmp_path)
    a = report.clients[0]
    assert a.splits["train"].duplicates == 1
    assert (a.overlap, a.question_overlap) == (2, 3)
    assert (a.elsewhere, a.elsewhere_client) == (2, "c")
    assert (a.validation_overlap, a.validated) == (1, 2)
    warnings = "\n".join(report.warnings)
    assert "client a: 1 of 3 validation records are in its train data too" in warnings
    assert "client a: 2 of 4 test records are in its validation data too" in warnings
    assert "client a: 1 of 4 train records repeat another one exactly" in warnings
    assert "client a: 2 of 4 test records are in its train data too" in warnings
    assert "client a: 1 of 4 test records have a question of its train data" in warnings
    assert "client a: 2 of 4 test records are in the train data of other clients" in warnings
    assert "b, c: without test data" in warnings


def test_a_classifiers_labels_are_balanced_and_nothing_is_masked(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(6)]
    write_clients(tmp_path, a_train=rows, a_test=rows[:1])
    report = report_on(tmp_path)
    assert report.labels == ("0", "1")
    assert report.clients[0].balance_of == "label"
    assert report.clients[0].splits["train"].balance == {"0": 3, "1": 3}
    assert report.example == ("t0", "0")


def test_unknown_tokens_ignored_files_and_missing_tests_are_told(tmp_path):
    tokenizer = bytewise(model_max_length=100)
    write_clients(tmp_path, a_train=answered("<unk>" * 5, "x"))
    (tmp_path / "tasks.json").write_text("[]")
    report = report_on(tmp_path, tokenizer=tokenizer)
    warnings = "\n".join(report.warnings)
    assert "does not know 36% of the tokens in train" in warnings  # 5 of 3 + 6 + 3 + 2
    assert warnings.startswith("ignored, because not named")
    assert "tasks.json" in warnings
    assert "no client has test data" in warnings
    assert "max_length=512 is more than the 100 tokens" in warnings


def test_the_report_is_json_and_shows_the_masked_part(tmp_path):
    write_clients(tmp_path, a_train=answered("yes"), a_test=answered("no"))
    report = report_on(tmp_path)
    assert report.example == ("q0:", "yes</s>")
    assert json.loads(json.dumps(asdict(report)))["clients"][0]["splits"]["test"]["records"] == 1


def test_a_record_the_tokenizer_cannot_take_is_named(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_clients(tmp_path, a_train=[asked("q", "a"), {"messages": chat}])
    with pytest.raises(DataError, match="client 'a', train record 2: a record has messages"):
        report_on(tmp_path)
