import json

import pytest
from data_files import asked, bytewise, write_clients

from fedalt.core.seeds import generator
from fedalt.data import task as task_module
from fedalt.data.folder import DataFolder, open_data
from fedalt.data.records import DataError
from fedalt.data.task import Task, hold_out


def task_of(path, **more):
    return Task(folder=open_data(path), tokenizer=bytewise(), **more)


def questions(task, client_id, split):
    return [record.question for record in task.records(client_id, split)]


@pytest.fixture
def twenty(tmp_path):
    rows = [asked(f"q{n}", "a") for n in range(20)]
    return write_clients(tmp_path, a_train=rows, b_train=rows, b_test=rows[:1])


def test_examples_are_the_records_in_file_order(twenty):
    task = task_of(twenty)
    assert [example.answer for example in task.examples("a", "train")] == ["a"] * 20
    assert questions(task, "a", "train") == [f"q{n}" for n in range(20)]
    assert task.examples("a", "validation") == task.examples("a", "test") == []
    assert len(task.examples("b", "test")) == 1


def test_validation_is_held_out_of_train_by_seed_and_client(twenty):
    task = task_of(twenty, validation=0.2, seed=1)
    train, held = questions(task, "a", "train"), questions(task, "a", "validation")
    assert (len(train), len(held)) == (16, 4)
    assert sorted(train + held) == sorted(f"q{n}" for n in range(20))
    assert questions(task_of(twenty, validation=0.2, seed=1), "a", "validation") == held
    assert questions(task_of(twenty, validation=0.2, seed=2), "a", "validation") != held
    assert questions(task, "b", "validation") != held


def test_a_validation_file_is_used_as_it_is(twenty):
    write_clients(twenty, a_validation=[asked("v", "a")])
    task = task_of(twenty, validation=0.2)
    assert questions(task, "a", "validation") == ["v"]
    assert len(questions(task, "a", "train")) == 20


def test_few_records_are_not_divided(tmp_path):
    write_clients(tmp_path, a_train=[asked(f"q{n}", "a") for n in range(9)])
    write_clients(tmp_path, b_train=[asked(f"q{n}", "a") for n in range(10)])
    task = task_of(tmp_path, validation=0.01)
    assert questions(task, "a", "validation") == []
    assert len(questions(task, "b", "validation")) == 1
    most = task_of(tmp_path, validation=0.99)
    assert len(questions(most, "b", "train")) == 1


def test_repeated_records_are_never_in_both_parts(tmp_path):
    rows = [asked(f"q{n % 7}", "A" if n % 2 else "a ") for n in range(60)]
    write_clients(tmp_path, a_train=rows)
    for seed in range(20):
        task = task_of(tmp_path, validation=0.3, seed=seed)
        train, held = questions(task, "a", "train"), questions(task, "a", "validation")
        assert held
        assert not set(train) & set(held)


def test_hold_out_takes_whole_groups_and_never_too_many():
    keys = [7] * 6 + [1, 2, 3, 4]
    for seed in range(20):
        held = hold_out(keys, 5, generator(seed))
        assert not held & set(range(6))
        assert len(held) == 4
    assert hold_out([7] * 10, 3, generator(0)) == set()


def test_test_data_is_read_for_test_alone(twenty, monkeypatch):
    task = task_of(twenty, validation=0.2)
    read = []
    records = DataFolder.records
    monkeypatch.setattr(
        DataFolder, "records", lambda self, *key: read.append(key) or records(self, *key)
    )
    for client_id in task.clients:
        task.examples(client_id, "train")
        task.examples(client_id, "validation")
    assert {split for _, split in read} == {"train"}
    task.examples("b", "test")
    assert read[-1] == ("b", "test")


def test_recent_examples_are_kept_and_only_those(twenty, monkeypatch):
    monkeypatch.setattr(task_module, "KEPT_IN_MEMORY", 1)
    task = task_of(twenty)
    first = task.examples("a", "train")
    assert task.examples("a", "train")[0] is first[0]
    first.clear()
    assert len(task.examples("a", "train")) == 20
    before = task.examples("a", "train")[0]
    task.examples("b", "train")
    assert task.examples("a", "train")[0] is not before


def test_an_answer_too_long_is_an_error_unless_cutting_is_allowed(tmp_path):
    write_clients(tmp_path, a_train=[asked("q", "short"), asked("q", "x" * 100)])
    with pytest.raises(DataError, match="client 'a', train record 2: the answer is 21 tokens"):
        task_of(tmp_path, max_length=80).examples("a", "train")
    task = task_of(tmp_path, max_length=80, cut_answers=True)
    assert len(task.examples("a", "train")[1].ids) == 80
    assert task.cut("a", "train") == (1, 1)


def test_wrong_settings_are_refused(twenty):
    with pytest.raises(ValueError, match=r"validation=1\.0"):
        task_of(twenty, validation=1.0)
    with pytest.raises(ValueError, match="max_length=1,"):
        task_of(twenty, max_length=1)


def test_every_record_that_is_refused_is_told_with_file_and_line(tmp_path):
    lines = [asked("q", "a"), asked("q", "x" * 100), asked("q", "b"), asked("q", "y" * 100)]
    write_clients(tmp_path, a_train=lines)
    file = tmp_path / "a.train.jsonl"
    file.write_text("\n" + file.read_text())  # a blank line is no record
    task = Task(folder=open_data(tmp_path), tokenizer=bytewise(), max_length=80)
    with pytest.raises(DataError) as caught:
        task.examples("a", "train")
    said = str(caught.value)
    assert "2 problems" in said
    assert "a.train.jsonl:3: client 'a', train record 2: the answer is" in said
    assert "a.train.jsonl:5: client 'a', train record 4: the answer is" in said


def test_also_in_a_file_that_clients_share(tmp_path):
    rows = [asked("q", "x" * (100 if n in (2, 5) else 1), client="ab"[n % 2]) for n in range(6)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    task = Task(folder=open_data(file), tokenizer=bytewise(), max_length=80)
    for client, place in (("a", "all.jsonl:5: "), ("b", "all.jsonl:11: ")):
        with pytest.raises(DataError, match=place):
            task.examples(client, "train")
