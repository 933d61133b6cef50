import hashlib
import json
from collections import Counter

import pytest
from data_files import asked, write_clients, write_lines

from fedalt.data.folder import open_data
from fedalt.data.partition import Partition, divide
from fedalt.data.records import DataError


def rows_of(count, categories=("x", "y", "z")):
    return [asked(f"q{n}", "a", category=categories[n % len(categories)]) for n in range(count)]


def questions(folder, client_id, *splits):
    return [record.question for split in splits for record in folder.records(client_id, split)]


def all_questions(folder):
    return sorted(
        question
        for client in folder.clients
        for question in questions(folder, client, "train", "test")
    )


def test_a_column_makes_one_client_per_value(tmp_path):
    rows = rows_of(6, ("open qa", 3))
    source = write_lines(tmp_path / "all.jsonl", rows)
    made = divide(source, tmp_path / "out", Partition(by="column", column="category"))
    assert made.names == {"open_qa": "open qa", "3": "3"}
    folder = open_data(tmp_path / "out")
    assert folder.clients == ("3", "open_qa")
    assert questions(folder, "3", "train") == ["q1", "q3", "q5"]
    kept = (tmp_path / "out" / "3.train.jsonl").read_text().splitlines()
    assert json.loads(kept[0]) == rows[1]
    assert folder.ignored == ()


def test_equal_parts_differ_by_one_record_at_most(tmp_path):
    source = write_lines(tmp_path / "all.jsonl", rows_of(23))
    divide(source, tmp_path / "out", Partition(by="equal", clients=11))
    folder = open_data(tmp_path / "out")
    assert folder.clients[:2] == ("client_00", "client_01")
    assert Counter(folder.counts(c, "train") for c in folder.clients) == {2: 10, 3: 1}
    assert all_questions(folder) == sorted(f"q{n}" for n in range(23))


def test_a_small_alpha_gives_uneven_shares_and_the_minimum_is_kept(tmp_path):
    source = write_lines(tmp_path / "all.jsonl", rows_of(300))

    def spread(alpha):
        target = tmp_path / f"out{alpha}"
        wanted = Partition(by="dirichlet", column="category", clients=5, alpha=alpha, minimum=7)
        made = divide(source, target, wanted)
        folder = open_data(target)
        assert all_questions(folder) == sorted(f"q{n}" for n in range(300))
        sizes = [folder.counts(client, "train") for client in folder.clients]
        assert min(sizes) >= 7
        assert made.counts["client_0"] == {"train": sizes[0], "test": 0}
        return max(sizes) - min(sizes), made.moved

    even, uneven = spread(1000.0), spread(0.05)
    assert even[0] < 30 < 100 < uneven[0]
    assert even[1] == 0 < uneven[1]


@pytest.mark.parametrize("by", ["equal", "dirichlet"])
def test_the_seed_decides(tmp_path, by):
    source = write_lines(tmp_path / "all.jsonl", rows_of(60))

    def fingerprint(name, seed):
        wanted = Partition(by=by, column="category", clients=3, test=0.2, seed=seed, minimum=2)
        divide(source, tmp_path / name, wanted)
        return open_data(tmp_path / name).fingerprint

    assert fingerprint("a", 1) == fingerprint("b", 1) != fingerprint("c", 2)


def test_test_data_is_taken_from_each_client_and_repetitions_stay_together(tmp_path):
    rows = [asked(f"q{n % 40}", "a") for n in range(200)]
    source = write_lines(tmp_path / "all.jsonl", rows)
    divide(source, tmp_path / "out", Partition(by="equal", clients=2, test=0.25))
    folder = open_data(tmp_path / "out")
    for client in folder.clients:
        assert 20 <= folder.counts(client, "test") <= 25
        train, test = (questions(folder, client, split) for split in ("train", "test"))
        assert not set(train) & set(test)


def test_no_label_is_in_test_alone(tmp_path):
    rows = [{"text": f"t{n}", "label": f"rare {n}" if n < 5 else "common"} for n in range(30)]
    source = write_lines(tmp_path / "all.jsonl", rows)
    for seed in range(5):
        wanted = Partition(by="equal", clients=2, test=0.4, seed=seed)
        divide(source, tmp_path / f"out{seed}", wanted)
        folder = open_data(tmp_path / f"out{seed}")
        assert len(folder.labels) == 6
        assert sum(folder.counts(client, "test") for client in folder.clients) == 12


def test_settings_seed_and_source_are_saved_beside_the_files(tmp_path):
    source = write_lines(tmp_path / "all.jsonl", rows_of(12))
    divide(source, tmp_path / "out", Partition(by="equal", clients=2, test=0.5, seed=3))
    saved = json.loads((tmp_path / "out" / "split.json").read_text())
    assert saved["settings"]["by"] == "equal"
    assert saved["settings"]["seed"] == 3
    assert saved["source"] == "all.jsonl"
    assert saved["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert saved["counts"]["client_1"] == {"train": 3, "test": 3}


def test_a_json_list_and_half_a_surrogate_pair_elsewhere_are_written_back(tmp_path):
    source = tmp_path / "all.json"
    source.write_text('[{"instruction": "é", "output": "o", "id": "\\ud800"}]', encoding="utf-8")
    divide(source, tmp_path / "out", Partition(by="equal", clients=1))
    assert questions(open_data(tmp_path / "out"), "client_0", "train") == ["é"]


def test_a_filled_folder_is_refused_and_an_empty_one_used(tmp_path):
    source = write_lines(tmp_path / "all.jsonl", rows_of(4))
    full = write_clients(tmp_path / "full", a_train=rows_of(1))
    wanted = Partition(by="equal", clients=2)
    with pytest.raises(DataError, match="expected a new or empty folder"):
        divide(source, full, wanted)
    (tmp_path / "empty").mkdir()
    divide(source, tmp_path / "empty", wanted)
    assert open_data(tmp_path / "empty").clients == ("client_0", "client_1")


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "all.jsonl", rows_of(4))

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedalt.data.partition.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        divide(source, tmp_path / "out", Partition(by="equal", clients=2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.jsonl"]


def test_bad_rows_are_named_with_their_lines(tmp_path):
    rows = [*rows_of(2), {"instruction": "i"}, asked("q", "a"), asked("q", "a", category=1.5)]
    source = write_lines(tmp_path / "all.jsonl", rows)
    with pytest.raises(DataError) as caught:
        divide(source, tmp_path / "out", Partition(by="column", column="category"))
    text = str(caught.value)
    assert text.startswith("3 problems")
    assert "all.jsonl:3: field 'output' is missing" in text
    assert "all.jsonl:4: field 'category'" in text
    assert "all.jsonl:5: field 'category'" in text
    assert not (tmp_path / "out").exists()


def test_values_that_give_one_file_name_are_refused(tmp_path):
    source = write_lines(tmp_path / "all.jsonl", rows_of(4, ("a b", "A_b")))
    with pytest.raises(DataError, match="value 'A_b': gives the same file name as 'a b'"):
        divide(source, tmp_path / "out", Partition(by="column", column="category"))


def test_too_few_records_are_refused(tmp_path):
    source = write_lines(tmp_path / "all.jsonl", rows_of(4))
    with pytest.raises(DataError, match="4 records cannot be divided among 5 clients"):
        divide(source, tmp_path / "out", Partition(by="equal", clients=5))
    wanted = Partition(by="dirichlet", column="category", clients=2, minimum=3)
    with pytest.raises(DataError, match="cannot give 2 clients 3 each"):
        divide(source, tmp_path / "out", wanted)
    with pytest.raises(DataError, match="no such file"):
        divide(tmp_path / "none.jsonl", tmp_path / "out", wanted)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"by": "size"}, "by='size'"),
        ({"by": "column"}, "needs the name of a column"),
        ({"by": "equal"}, "clients=None"),
        ({"by": "equal", "clients": 0}, "clients=0"),
        ({"by": "equal", "clients": 2, "test": 1.0}, r"test=1\.0"),
        ({"by": "dirichlet", "column": "c", "clients": 2, "alpha": 0.0}, r"alpha=0\.0"),
        ({"by": "dirichlet", "column": "c", "clients": 2, "minimum": 0}, "minimum=0"),
    ],
)
def test_wrong_settings_are_refused(settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        Partition(**settings)
