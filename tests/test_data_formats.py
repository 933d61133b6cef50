"""Data in other formats than JSON lines end in one sentence that names the format."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import zipfile

import pytest
from commands import call
from data_files import asked
from runs_for_tests import write_clients

from fedalt.data.folder import open_data
from fedalt.data.layouts import not_read
from fedalt.data.partition import Partition, divide
from fedalt.data.records import DataError

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
    "CSV": separated(","),
    "TSV": separated("\t"),
    "CSV with semicolons": separated(";"),
    "Parquet": b"PAR1" + bytes(range(256)),
    "an Excel workbook": zipped("xl/workbook.xml"),
    "a ZIP archive": zipped("anna.train.jsonl"),
    "a gzip archive": gzip.compress(LINES),
    "a bzip2 archive": bz2.compress(LINES),
    "an xz archive": lzma.compress(LINES),
    "a GGUF model": b"GGUF\3\0\0\0" + bytes(64),
    "a model's weights": (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32"' + bytes(64),
    "a binary file": bytes(range(256)) * 4,
    "JSON that is printed over several lines": json.dumps(ROWS[0], indent=2).encode() * 3,
    "a PDF": b"%PDF-1.7\n1 0 obj\n",
}


@pytest.mark.parametrize(("name", "raw"), OTHERS.items())
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


@pytest.mark.parametrize("name", ["CSV", "TSV", "CSV with semicolons"])
def test_the_command_that_is_named_converts(tmp_path, name):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / "all.csv").write_bytes(OTHERS[name])
    with pytest.raises(DataError) as caught:
        open_data(folder / "all.csv")
    command = str(caught.value).rpartition("convert with `")[2].removesuffix("`")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    data = open_data(folder / "all.jsonl")
    assert data.clients == ("anna",)
    assert [record.answer for record in data.records("anna", "train")] == [
        row["output"] for row in ROWS
    ]


@pytest.mark.parametrize(
    "raw",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
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


@pytest.mark.parametrize("suffix", ["csv", "tsv", "xlsx", "parquet"])
def test_the_commands_tell_it(tmp_path, capsys, suffix):
    raw = {"csv": "CSV", "tsv": "TSV", "xlsx": "an Excel workbook", "parquet": "Parquet"}[suffix]
    file = tmp_path / f"all.{suffix}"
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
    strange = ["anna.val.jsonl", "cleo.train.json", "dora_test.jsonl", "notes.docx"]
    for name in [*strange, "README.md", "LICENSE", ".hidden.jsonl", "split.json"]:
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "emil.train.jsonl").write_bytes(LINES)
    ignored = open_data(tmp_path).ignored
    assert sorted(ignored) == sorted([*strange, "more/emil.train.jsonl"])
    said = not_read(ignored)
    assert "anna.val.jsonl (anna.validation.jsonl?)" in said
    assert "cleo.train.json (cleo.train.jsonl?)" in said
    assert "dora_test.jsonl (dora.test.jsonl?)" in said
    assert "NAME.train.jsonl" in said


def test_files_beside_the_one_with_a_client_column_are_named_too(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(LINES)
    (tmp_path / "val.jsonl").write_bytes(LINES)
    assert open_data(tmp_path).ignored == ("val.jsonl",)
    assert open_data(tmp_path / "train.jsonl").ignored == ()


def test_a_run_says_which_files_it_did_not_read(run_flags, tmp_path, capsys):
    data = write_clients(tmp_path / "d")
    (data / "cleo.train.json").write_bytes(LINES)
    (data / "anna.val.jsonl").write_bytes(LINES)
    words = ["--data", data, "--rounds", "1", "--no-generate", "--out", tmp_path / "r"]
    assert call("run", *run_flags, *words) == 0
    said = capsys.readouterr().err
    assert "cleo.train.json" in said
    assert "anna.val.jsonl" in said
    assert "NAME.train.jsonl" in said
