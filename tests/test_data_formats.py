"""Tables are read; data in any other format end in one sentence that names it."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
import zlib
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from commands import call
from data_files import asked
from runs_for_tests import write_clients

from fedalt.data.folder import open_data
from fedalt.data.layouts import not_read
from fedalt.data.partition import Partition, divide
from fedalt.data.records import Columns, DataError

ROWS = [asked(f"q {n}, or so?", f"a; {n}", client="anna") for n in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def separated(delimiter: str) -> bytes:
    import csv

    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(ROWS)
    return stream.getvalue().encode()


def zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, LINES)
    return stream.getvalue()


OTHERS = {
    "an Excel workbook": zipped("xl/workbook.xml"),
    "a ZIP archive": zipped("anna.train.jsonl"),
    "a bzip2 archive": bz2.compress(LINES),
    "an xz archive": lzma.compress(LINES),
    "a GGUF model": b"GGUF\3\0\0\0" + bytes(64),
    "a model's weights": (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32"' + bytes(64),
    "a binary file": bytes(range(256)) * 4,
    "JSON that is printed over several lines": json.dumps(ROWS[0], indent=2).encode() * 3,
    "a PDF": b"%PDF-1.7\n1 0 obj\n",
}


@pytest.mark.parametrize(("name", "raw"), OTHERS.items(), ids=OTHERS.keys())
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "data"])
def test_every_way_of_giving_it_names_the_format_in_one_sentence(tmp_path, name, raw, suffix):
    folder = tmp_path / "d"
    folder.mkdir()
    file = folder / f"anna.train.{suffix}"
    file.write_bytes(raw)
    ways = [
        lambda: open_data(folder),
        lambda: open_data(file),
        lambda: divide(file, tmp_path / "out", Partition(by="equal", clients=2)),
    ]
    for way in ways:
        with pytest.raises(DataError) as caught:
            way()
        said = str(caught.value)
        assert name in said
        assert "anna.train" in said
        assert "expected JSON lines" in said
        assert "\n" not in said


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


TABLES = {
    "csv": separated(","),
    "csv, with semicolons": separated(";"),
    "csv, with a byte order mark": b"\xef\xbb\xbf" + separated(","),
    "tsv": separated("\t"),
    "parquet": parquet(),
    "csv.gz": gzip.compress(separated(",")),
    "jsonl.gz": gzip.compress(LINES),
    "json": json.dumps(ROWS, indent=2).encode(),
}


@pytest.mark.parametrize(("name", "raw"), TABLES.items(), ids=TABLES.keys())
def test_tables_hold_the_records_that_json_lines_hold(tmp_path, name, raw):
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(LINES)
    suffix = name.partition(",")[0]
    (tmp_path / "one").mkdir()
    for file in (tmp_path / f"all.{suffix}", tmp_path / "one" / f"anna.train.{suffix}"):
        file.write_bytes(raw)
    for path in (tmp_path / f"all.{suffix}", tmp_path / "one"):
        data, wanted = open_data(path), open_data(lines)
        assert data.clients == ("anna",)
        assert data.records("anna", "train") == wanted.records("anna", "train")
        assert data.fingerprint == wanted.fingerprint
    divide(tmp_path / f"all.{suffix}", tmp_path / "out", Partition(by="column", column="client"))
    assert open_data(tmp_path / "out").clients == ("anna",)


def test_a_clients_rows_of_a_table_are_told_by_their_number(tmp_path):
    file = tmp_path / "all.csv"
    file.write_text('site,question,answer\na,"two\nlines, ""so""",NA\nb,q,007\na,r,s\n')
    data = open_data(file, Columns("site", "question", "answer"))
    assert data.clients == ("a", "b")
    assert [record.answer for record in data.records("a", "train")] == ["NA", "s"]
    assert data.records("a", "train")[0].question == 'two\nlines, "so"'
    assert data.records("b", "train")[0].answer == "007"
    assert data.places("a", "train") == ["all.csv:2", "all.csv:4"]


ORDINARY = {
    "lines that begin like JSON": "text,label,client\n{x} y,1,a\n[z],2,a\n",
    "the numbers that pandas writes": ",client,text,label\n0,a,{x} y,1\n1,a,[z],2\n",
    "them twice": ",Unnamed: 0,client,text,label\n0,0,a,{x} y,1\n1,1,a,[z],2\n",
    "Excel's comma behind": "client,text,label,,\na,{x} y,1,,\na,[z],2,,\n",
}


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY.keys())
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_what_programs_write_into_tables_is_read(tmp_path, text, suffix):
    file = tmp_path / f"all.{suffix}"
    file.write_text(text if suffix == "csv" else text.replace(",", "\t"))
    records = open_data(file).records("a", "train")
    assert [(record.text, record.answer) for record in records] == [("{x} y", "1"), ("[z]", "2")]


@pytest.mark.parametrize("above", ["", "\n", "\n ;;\n", "\n" * 8])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
def test_empty_rows_are_no_records_but_count(tmp_path, above, begin):
    file = tmp_path / "all.csv"
    text = f'{above}client;instruction;output\n\na;"q\n\n1";r\n;;\n  \na;s;t\n\n\n'
    file.write_bytes(begin + text.encode())
    data, before = open_data(file), above.count("\n")
    assert [record.answer for record in data.records("a", "train")] == ["r", "t"]
    assert data.places("a", "train") == [f"all.csv:{before + 3}", f"all.csv:{before + 6}"]
    file.write_bytes(begin + f"{text}a;;u\n".encode())
    with pytest.raises(DataError, match=f"all.csv:{before + 9}: field 'instruction' is empty"):
        open_data(file)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_first_line_that_tells_excel_the_delimiter_is_no_row(tmp_path, delimiter, end):
    table = separated(delimiter).decode().replace("\r\n", end)
    (tmp_path / "anna.train.csv").write_text(f"sep={delimiter}{end}{table}", newline="")
    (tmp_path / "bert.train.csv").write_text(table, newline="")
    data = open_data(tmp_path)
    assert data.records("anna", "train") == data.records("bert", "train")


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_names_tell_what_parts_cells_where_the_first_cell_has_many_lines(tmp_path, delimiter):
    options = "\n".join(f"- {name}" for name in "abcdefgh")
    text = f'instruction,output\n"which?\nOPTIONS:\n{options}",b\nshort,c\n'
    (tmp_path / "anna.train.csv").write_text(text.replace(",", delimiter))
    records = open_data(tmp_path).records("anna", "train")
    assert [record.answer for record in records] == ["b", "c"]
    assert records[0].options == tuple("abcdefgh")


@pytest.mark.parametrize("name", ["anna.train.csv", "anna.train.csv.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_is_read_packed_or_not_whatever_its_name_says(tmp_path, name, packed):
    text = b"instruction,output\nask,yes\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if packed else text)
    (record,) = open_data(tmp_path).records("anna", "train")
    assert (record.instruction, record.answer) == ("ask", "yes")


def test_a_csv_file_needs_no_further_package_and_its_cells_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr("fedalt.data.tables.find_spec", lambda _: None)
    text = "a, b;\n" * 40_000
    (tmp_path / "anna.train.csv").write_text(f'instruction,output\n"{text}",yes\nask,no\n')
    first, second = open_data(tmp_path).records("anna", "train")
    assert (first.instruction, second.instruction) == (text, "ask")
    (tmp_path / "anna.train.csv").rename(tmp_path / "anna.train.txt")
    (tmp_path / "anna.train.parquet").write_bytes(parquet())
    with pytest.raises(DataError, match="reading Parquet needs a package"):
        open_data(tmp_path)


def test_json_lines_with_a_tables_name_are_json_lines(tmp_path):
    (tmp_path / "anna.csv").write_bytes(b"\n" + LINES)
    assert open_data(tmp_path).counts("anna", "train") == 6


def test_a_folder_of_tables_is_a_client_for_each(tmp_path):
    for name in ("anna", "bert"):
        (tmp_path / f"{name}.csv").write_text("instruction,output\nq,a\n")
    assert open_data(tmp_path).clients == ("anna", "bert")


def conversation(name: str, **arguments: object) -> dict[str, object]:
    """A record that calls a tool of its own with arguments of its own."""
    properties = {key: {"type": "string", "enum": ["x", None]} for key in arguments}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "client": "anna",
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "r", "name": name},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": name, "parameters": properties}}],
    }


def test_arrow_adds_nothing_to_the_calls_of_a_conversation(tmp_path):
    rows = [conversation("time", zone="x", at={"day": "y"}), conversation("weather", city="z")]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    wanted = open_data(tmp_path / "all.jsonl")
    for name in ("all.parquet", "saved"):
        found = open_data(tmp_path / name)
        assert found.records("anna", "train") == wanted.records("anna", "train")
        assert found.fingerprint == wanted.fingerprint


def test_a_null_in_json_lines_is_an_argument_as_it_stands(tmp_path):
    (tmp_path / "all.jsonl").write_text(json.dumps(conversation("time", zone=None)))
    (record,) = open_data(tmp_path / "all.jsonl").records("anna", "train")
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"zone": None}


def test_a_dataset_that_was_saved_is_read_split_by_split(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert open_data(tmp_path / "one").counts("anna", "train") == 6
    assert open_data(tmp_path / "two").counts("anna", "test") == 1


BROKEN = {
    "no such column": (b"instruction,client\nq,anna\n", "field 'output' is missing"),
    "a cell too many": (
        b"instruction,output,client\nq,a,anna\nq,a,anna,b\n",
        "row 3 has 4 cells, but the first has 3",
    ),
    "a name too few": (
        b"instruction,output\nanna,q,a\n",
        "row 2 has 3 cells, but the first has 2",
    ),
    "an open quote": (b'instruction,output,client\n"q,a,anna\n', "as CSV"),
    "two columns alike beside unnamed ones": (
        b",,client,client\n1,2,3,4\n",
        "several columns are called 'client'",
    ),
    "two columns alike": (b"client,client\n1,2\n", "several columns are called 'client'"),
    "a head alone": (b"instruction,output,client\n", "holds no records"),
    "nothing": (b"", "holds no records"),
    "another encoding": ("instruction,output,client\né,a,b\n".encode("cp1252"), "cp1252"),
    "UTF-16": ("instruction,output,client\ne,a,b\n".encode("utf-16"), "UTF-16"),
    "half an archive": (gzip.compress(separated(","))[:-9], "cannot be read"),
    "no Parquet": (b"PAR1" + bytes(range(256)), "cannot be read as Parquet"),
}


@pytest.mark.parametrize(("raw", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_table_is_one_error_that_names_the_file(tmp_path, raw, told):
    file = tmp_path / "all.csv"
    file.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        open_data(file)
    assert told in str(caught.value)
    assert "all.csv" in str(caught.value)


DAMAGE = b"\x07\xff"  # a block of a type that there is not


@pytest.mark.parametrize("lines", [0, 2000], ids=["at once", "late"])
@pytest.mark.parametrize("ways", ["jsonl", "csv", "json"])
def test_a_damaged_archive_is_one_error_that_names_the_file(tmp_path, lines, ways):
    whole = {"jsonl": LINES * lines, "csv": separated(",") * lines, "json": b"[" + LINES * lines}
    packer = zlib.compressobj(wbits=31)
    raw = packer.compress(whole[ways]) + packer.flush(zlib.Z_FULL_FLUSH)
    file = tmp_path / f"all.{ways}.gz"
    file.write_bytes(raw + DAMAGE)
    with pytest.raises(DataError, match=rf"all\.{ways}\.gz.*cannot be read") as caught:
        open_data(file)
    assert "\n" not in str(caught.value)


def test_an_archive_that_is_damaged_once_it_is_open_has_changed(tmp_path):
    file = tmp_path / "all.jsonl.gz"
    file.write_bytes(gzip.compress(LINES))
    data = open_data(file)
    file.write_bytes(zlib.compressobj(wbits=31).flush(zlib.Z_FULL_FLUSH) + DAMAGE)
    with pytest.raises(DataError, match="changed since it was opened"):
        data.records("anna", "train")


def test_an_empty_parquet_file_holds_no_records(tmp_path):
    columns = {"client": pyarrow.array([], pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "all.parquet")
    with pytest.raises(DataError, match="holds no records"):
        open_data(tmp_path / "all.parquet")


def test_columns_of_other_names_are_mapped_and_a_missing_one_is_named(tmp_path):
    file = tmp_path / "all.csv"
    file.write_text("client,ask,say,output\na,q,r,x\n")
    assert open_data(file, Columns(None, "ask", "say")).records("a", "train")[0].answer == "r"
    with pytest.raises(DataError, match="no column 'reply'; the columns are 'client', 'ask'"):
        open_data(file, Columns(None, "ask", "reply"))
    with pytest.raises(DataError, match="belong together"):
        Columns(None, "ask", None)
    divide(
        file, tmp_path / "o", Partition(by="column", column="client"), Columns(None, "ask", "say")
    )
    assert open_data(tmp_path / "o").records("a", "train")[0].answer == "r"


def test_without_a_network_a_dataset_of_the_hub_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match="'somebody/something' cannot be had"):
        open_data(Path("hub:somebody/something"))


@pytest.mark.parametrize(
    "raw",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        json.dumps(ROWS).encode(),
    ],
)
def test_json_lines_and_lists_are_read_as_ever(tmp_path, raw):
    (tmp_path / "anna.train.jsonl").write_bytes(raw)
    assert open_data(tmp_path).counts("anna", "train") == 6


def test_broken_lines_are_still_told_line_by_line(tmp_path):
    (tmp_path / "anna.train.jsonl").write_bytes(b'{"instruction": "a, b", oops}\n' + LINES + b"x,y")
    with pytest.raises(DataError) as caught:
        open_data(tmp_path)
    assert "anna.train.jsonl:1: not valid JSON" in str(caught.value)
    assert "anna.train.jsonl:8: not valid JSON" in str(caught.value)


def test_a_line_that_is_nested_without_end_is_told_by_its_number(tmp_path):
    raw = b"".join([b'{"a":', b"[" * 100_000, b"]" * 100_000, b"}\n"])
    for at, text in enumerate((raw, b'{"instruction": "ask", "output": "yes"}\n' + raw), 1):
        (tmp_path / "anna.train.jsonl").write_bytes(text)
        with pytest.raises(DataError, match=rf"jsonl:{at}: .*nested too deeply"):
            open_data(tmp_path)


def test_the_commands_tell_it(tmp_path, capsys):
    raw = "an Excel workbook"
    file = tmp_path / "all.xlsx"
    file.write_bytes(OTHERS[raw])
    for words in (
        ["data", "check", file],
        ["data", "split", file, tmp_path / "o", "--equal", "2"],
        ["run", "--data", file, "--out", tmp_path / "r"],
    ):
        assert call(*words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert raw in said
        assert said.count("\n") == 1


def test_files_of_no_layout_are_named_with_the_name_they_may_be_meant_to_have(tmp_path):
    (tmp_path / "anna.train.jsonl").write_bytes(LINES)
    strange = ["anna.val.jsonl", "cleo.train.ndjson", "dora_test.jsonl", "notes.docx"]
    for name in [*strange, "README.md", "LICENSE", ".hidden.jsonl", "split.json"]:
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "emil.train.jsonl").write_bytes(LINES)
    ignored = open_data(tmp_path).ignored
    assert sorted(ignored) == sorted([*strange, "more/emil.train.jsonl"])
    said = not_read(ignored)
    assert "anna.val.jsonl (anna.validation.jsonl?)" in said
    assert "cleo.train.ndjson (cleo.train.jsonl?)" in said
    assert "dora_test.jsonl (dora.test.jsonl?)" in said
    assert "NAME.train.jsonl" in said


def test_files_beside_the_one_with_a_client_column_are_named_too(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(LINES)
    (tmp_path / "val.jsonl").write_bytes(LINES)
    assert open_data(tmp_path).ignored == ("val.jsonl",)
    assert open_data(tmp_path / "train.jsonl").ignored == ()


def test_a_run_says_which_files_it_did_not_read(run_flags, tmp_path, capsys):
    data = write_clients(tmp_path / "d")
    (data / "cleo.train.ndjson").write_bytes(LINES)
    (data / "anna.val.jsonl").write_bytes(LINES)
    words = ["--data", data, "--rounds", "1", "--no-generate", "--out", tmp_path / "r"]
    assert call("run", *run_flags, *words) == 0
    said = capsys.readouterr().err
    assert "cleo.train.ndjson" in said
    assert "anna.val.jsonl" in said
    assert "NAME.train.jsonl" in said


QUOTES = {
    "a quote that opens a cell and ends below": '"Good\tyes\tanna\n"Bad\tno\tanna\n',
    "a word in quotes at the beginning": '"Yes" she said\tyes\tanna\n',
}


@pytest.mark.parametrize("rows", QUOTES.values(), ids=QUOTES.keys())
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_quotes_that_join_or_shorten_cells_are_refused_by_row(tmp_path, rows, suffix):
    text = f"instruction\toutput\tclient\nq\ta\tanna\n{rows}"
    file = tmp_path / f"all.{suffix}"
    file.write_text(text if suffix == "tsv" else text.replace("\t", ","))
    with pytest.raises(DataError, match=rf"all\.{suffix}.*row 3: a quotation mark begins a cell"):
        open_data(file)


def test_a_row_that_ends_early_has_no_empty_answer(tmp_path):
    file = tmp_path / "anna.train.csv"
    file.write_text("instruction,output\nq,a\nbroken in\ntwo,b\n")
    with pytest.raises(
        DataError, match=r"anna\.train\.csv:3: field 'output': expected text, got null"
    ):
        open_data(tmp_path)
    file.write_text("instruction,output,input\nq,a\nr,b,c\n")
    records = open_data(tmp_path).records("anna", "train")
    assert [record.answer for record in records] == ["a", "b"]


def test_splits_of_a_saved_dataset_that_are_not_read_are_named(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, dev=rows).save_to_disk(tmp_path / "two")
    assert open_data(tmp_path / "two").ignored == ("dev",)
    datasets.DatasetDict(dev=rows, eval=rows).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="no split 'train'; the dataset's splits are dev, eval"):
        open_data(tmp_path / "none")
