import json
import os
import tracemalloc

import pytest
from data_files import asked, write_clients, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedalt.data.folder import open_data
from fedalt.data.records import Columns, DataError, Instruction

ROWS = [asked("1 + 1", "2"), asked("2 + 2", "4")]


def failure(path, *columns):
    with pytest.raises(DataError) as caught:
        open_data(path, *columns)
    return str(caught.value)


def test_a_folder_of_named_files(tmp_path):
    write_clients(tmp_path, b_train=ROWS, b_test=ROWS[:1], a_train=ROWS[:1], a_validation=ROWS)
    (tmp_path / "notes.txt").write_text("x")
    folder = open_data(tmp_path)
    assert folder.clients == ("a", "b")
    assert folder.kind == "generate"
    assert folder.records("b", "train") == [
        Instruction("1 + 1", "", "2"),
        Instruction("2 + 2", "", "4"),
    ]
    assert folder.records("a", "test") == []
    assert [folder.counts("a", split) for split in ("train", "validation", "test")] == [1, 2, 0]
    assert folder.ignored == ("notes.txt",)
    with pytest.raises(DataError, match="no client 'c'"):
        folder.records("c", "train")


@pytest.mark.parametrize("train", [".", "train"])
@pytest.mark.parametrize("test", [".", "test"])
def test_the_reference_layout(tmp_path, train, test):
    (tmp_path / train).mkdir(exist_ok=True)
    (tmp_path / train / "local_training_0.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / train / "local_training_1.json").write_text(json.dumps(ROWS[:1]))
    write_lines(tmp_path / test / "local_testing_0.jsonl", ROWS)
    folder = open_data(tmp_path)
    assert folder.clients == ("0", "1")
    assert [folder.counts("0", "train"), folder.counts("0", "test")] == [2, 2]
    assert folder.records("0", "train") == folder.records("0", "test")


def test_one_file_with_a_client_column_and_its_siblings(tmp_path):
    rows = [{**asked(f"é{n}", "x"), "client": n % 2} for n in range(5)]
    rows += [{**asked("last", "x"), "client": 1, "split": "validation"}]
    file = write_lines(tmp_path / "all.train.jsonl", rows)
    write_lines(tmp_path / "all.test.jsonl", rows[:1])
    folder = open_data(file)
    assert folder.clients == ("0", "1")
    assert [record.question for record in folder.records("1", "train")] == ["é1", "é3"]
    assert folder.counts("0", "test") == 1
    assert folder.records("1", "validation")[0].question == "last"


@pytest.mark.parametrize("column", ["Split", "SPLIT", "split "])
def test_a_split_by_nearly_its_name_does_not_train_on_test_records(tmp_path, column):
    file = write_lines(
        tmp_path / "all.jsonl", [{**row, "client": "a", column: "test"} for row in ROWS]
    )
    assert f"column {column!r}: expected 'split', spelt exactly so" in failure(file)


def test_the_client_column_may_have_any_name(tmp_path):
    file = write_lines(tmp_path / "all.jsonl", [{**row, "site": "x"} for row in ROWS])
    assert open_data(tmp_path, Columns("site")).clients == ("x",)
    assert "no column client or client_id among the fields instruction" in failure(file)
    assert "field 'ward'" in failure(file, Columns("ward"))


def test_the_fingerprint_is_that_of_the_records_in_any_layout(tmp_path):
    named = write_clients(tmp_path / "named", a_train=ROWS, b_train=ROWS[:1])
    column = write_lines(
        tmp_path / "all.jsonl",
        [{**ROWS[0], "client": "b"}, *({**row, "client": "a"} for row in ROWS)],
    )
    assert open_data(named).fingerprint == open_data(column).fingerprint
    other = write_clients(tmp_path / "other", a_train=ROWS[::-1], b_train=ROWS[:1])
    assert open_data(named).fingerprint != open_data(other).fingerprint


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_tolerated(tmp_path):
    text = "\r\n".join(["", json.dumps(ROWS[0]), "  ", json.dumps(ROWS[1])])
    (tmp_path / "a.train.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert open_data(tmp_path).counts("a", "train") == 2
    (tmp_path / "b.train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode())
    assert open_data(tmp_path).counts("b", "train") == 1


def test_labels_are_those_of_the_train_files_and_sort_by_value(tmp_path):
    def labelled(*labels):
        return [{"text": "t", "label": label} for label in labels]

    write_clients(tmp_path, a_train=labelled(10, 2), b_train=labelled("0", "2"), b_test=labelled(2))
    folder = open_data(tmp_path)
    assert (folder.kind, folder.labels) == ("classify", ("0", "2", "10"))
    # One clinic pads its codes: numbers that are equal have an order all the same.
    write_clients(tmp_path, b_train=labelled("01", "1", "00", "0", "02", "2"), b_test=labelled(2))
    assert open_data(tmp_path).labels == ("0", "00", "01", "1", "02", "2", "10")
    write_clients(tmp_path, b_train=labelled("0", "2"), b_test=labelled(2))
    write_clients(tmp_path, b_test=labelled(2, 7))
    assert "b.test.jsonl:2: field 'label': no train record has the label '7'" in failure(tmp_path)


def test_all_problems_come_in_one_error_with_file_and_line(tmp_path):
    write_clients(tmp_path, a_train=[{"instruction": "i"}, *ROWS], b_train=ROWS, c_test=ROWS)
    with (tmp_path / "b.train.jsonl").open("ab") as stream:
        stream.write(b'{"instruction": "i", \n\xff\xfe\n')
    (tmp_path / "d.train.jsonl").write_text("\n")
    text = failure(tmp_path)
    assert text.startswith(f"5 problems in {tmp_path}:")
    assert "a.train.jsonl:1: field 'output' is missing" in text
    assert "b.train.jsonl:3: not valid JSON" in text
    assert "b.train.jsonl:4: byte 1 of the line is not UTF-8" in text
    assert "c.test.jsonl: client 'c' has test data but no train file" in text
    assert "d.train.jsonl: holds no records" in text


def test_a_long_list_of_problems_is_cut(tmp_path):
    write_clients(tmp_path, a_train=[{}] * 100)
    text = failure(tmp_path)
    assert text.startswith("100 problems")
    assert text.endswith("and 80 more")
    assert text.count("\n") == 21


def test_two_clients_of_one_name_are_refused(tmp_path):
    write_clients(tmp_path / "case", a_train=ROWS, A_train=ROWS)
    assert "differs from 'A' of A.train.jsonl in case only" in failure(tmp_path / "case")
    for suffix in ("json", "jsonl"):
        write_lines(tmp_path / "both" / f"local_training_0.{suffix}", ROWS)
    assert "client '0' already has train data in local_training_0.json" in failure(
        tmp_path / "both"
    )
    assert "\n" not in failure(tmp_path / "both")
    write_lines(tmp_path / "layouts" / "local_training_0.json", ROWS)
    write_lines(tmp_path / "layouts" / "0.train.jsonl", ROWS)
    assert "client '0' already has train data in 0.train.jsonl" in failure(tmp_path / "layouts")
    rows = [{**ROWS[0], "client": name} for name in ("Ann", "ann", "ann")]
    text = failure(write_lines(tmp_path / "all.jsonl", rows))
    assert text.count("client 'ann' differs from 'Ann' in case only") == 1


@pytest.mark.parametrize("name", ["..", "a b", "é", ".hidden", "a/b", "x" * 101, "a."])
def test_a_client_name_that_cannot_name_a_folder_is_refused(tmp_path, name):
    file = write_lines(tmp_path / "all.jsonl", [{**ROWS[0], "client": name}])
    assert f"all.jsonl:1: client {name!r}: expected a name" in failure(file)


def test_all_clients_have_the_same_kind(tmp_path):
    write_clients(tmp_path, a_train=ROWS, b_train=[{"text": "t", "label": n} for n in range(3)])
    text = failure(tmp_path)
    assert "b.train.jsonl:1: a record to classify, but a.train.jsonl:1 is one to generate" in text
    assert "\n" not in text


def test_what_is_missing_or_empty_is_said(tmp_path):
    assert "no such file or folder" in failure(tmp_path / "nowhere")
    assert "found an empty folder" in failure(tmp_path)
    (tmp_path / "x.txt").write_text("a,b")
    assert "expected NAME.train.jsonl" in failure(tmp_path)
    assert "found x.txt" in failure(tmp_path)
    write_clients(tmp_path / "inner", a_train=ROWS)
    assert f"did you mean {tmp_path / 'inner'}?" in failure(tmp_path)
    assert "expected a file of records" in failure(tmp_path / "x.txt")
    write_clients(tmp_path / "folder", a_train=ROWS)
    (tmp_path / "folder" / "b.test.jsonl").mkdir()
    assert "b.test.jsonl: expected a file of records, but it is a folder" in failure(
        tmp_path / "folder"
    )
    write_clients(tmp_path / "empty", a_train=[], b_train=ROWS)
    assert failure(tmp_path / "empty").endswith("a.train.jsonl: holds no records")
    same = write_clients(tmp_path / "same", a_train=[{"text": "t", "label": "x"}] * 3)
    assert "all train records have the label 'x'" in failure(same)


def test_a_wrong_record_is_all_that_is_told_of_it(tmp_path):
    rows = [{"client": "a", "instruction": "i", "output": 7}, *({"client": "b"} | r for r in ROWS)]
    told = failure(write_lines(tmp_path / "all.jsonl", rows))
    assert told.endswith("all.jsonl: all.jsonl:1: field 'output': expected text, got 7")
    labels = [{"text": "t", "label": "x"}, {"text": "", "label": "y"}]
    told = failure(
        write_clients(tmp_path / "labels", a_train=labels, a_test=[{**labels[0], "label": "y"}])
    )
    assert told.endswith("a.train.jsonl:2: field 'text' is empty; expected text")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[\n{"instruction": "i", "output": "o"},\n{"instruction" "i"}]', ":3: not valid JSON"),
        ('[{"instruction": "i", "output": "o"}\n', ":2: not valid JSON: expected ',' or ']'"),
        ('[{"instruction": "i", "output": "o"}] x', ":1: not valid JSON: text behind the end"),
        ('[\n{"instruction": "i", "output": "o"},\n\n{"output": "i"}]', ":4: no known record form"),
        ("[" * 100_000, ":1: not usable JSON"),
        ('[\n{"output": "o",\n"output": "p"}]', ":2: the key 'output' is given twice"),
        ("[]", ": holds no records"),
    ],
)
def test_a_broken_json_list_is_named_with_its_line(tmp_path, text, wanted):
    (tmp_path / "local_training_0.json").write_text(text)
    assert f"local_training_0.json{wanted}" in failure(tmp_path)


@pytest.mark.parametrize(
    "inner", ['"output": "p"', '"\\u006futput": "o"', '"x": [{"y": 1, "y": 1}]']
)
def test_a_key_given_twice_is_named_with_file_and_line_and_never_the_last_one_wins(tmp_path, inner):
    lines = ['{"instruction": "i", "output": "o"}', '{"instruction": "j", "output": "o", %s}']
    (tmp_path / "a.train.jsonl").write_text("\n".join(lines) % inner)
    key = "y" if "y" in inner else "output"
    said = f"a.train.jsonl:2: the key '{key}' is given twice in one object"
    assert failure(tmp_path).endswith(said)


def test_a_number_of_too_many_digits_and_a_pipe_are_named(tmp_path):
    (tmp_path / "a.train.jsonl").write_text('{"n": %s}\n' % ("9" * 5000))
    os.mkfifo(tmp_path / "b.train.jsonl")
    told = failure(tmp_path)
    assert "a.train.jsonl:1: not usable JSON: a number of too many digits" in told
    assert "b.train.jsonl: cannot be read (it is a pipe, not a file)" in told


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=40),
    st.integers(0, 80),
    st.sampled_from(["local_training_0.json", "a.train.jsonl"]),
)
def test_damaged_bytes_end_in_a_data_error_or_are_read(tmp_path, noise, at, name):
    whole = json.dumps(ROWS[:2]) if name.endswith("json") else "\n".join(map(json.dumps, ROWS))
    raw = whole.encode()
    file = tmp_path / name
    file.write_bytes(raw[:at] + noise + raw[at + len(noise) :])
    try:
        folder = open_data(tmp_path)
        assert folder.records(folder.clients[0], "train")
    except DataError:
        pass
    finally:
        file.unlink()


def test_a_file_changed_after_opening_is_refused(tmp_path):
    write_clients(tmp_path, a_train=ROWS)
    folder = open_data(tmp_path)
    write_clients(tmp_path, a_train=ROWS * 2)
    with pytest.raises(DataError, match="changed since it was opened, 4 records instead of 2"):
        folder.records("a", "train")
    (tmp_path / "a.train.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        folder.records("a", "train")


def test_opening_holds_no_text(tmp_path):
    long = [asked("x" * 20_000, str(n)) for n in range(5)]
    for client in range(40):
        write_lines(tmp_path / f"c{client}.train.jsonl", long)
    tracemalloc.start()
    try:
        folder = open_data(tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(folder.clients) == 40
    assert kept < 200_000  # the text has 4,000,000 characters
    assert peak < 600_000


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "clients", "kind"),
    [("fedalt_tasks", 8, "generate"), ("flan_feddpa", 8, "generate"), ("glue", 6, "classify")],
)
def test_real_folders_open(shared_dir, name, clients, kind):
    folder = open_data(shared_dir / "data" / name)
    assert (len(folder.clients), folder.kind) == (clients, kind)
    assert all(folder.counts(client, "test") >= 200 for client in folder.clients)
