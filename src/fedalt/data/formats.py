"""What a file of records is by its first bytes: JSON lines, a table, or what is not read."""

import csv
import json
import shlex
import zipfile
from itertools import dropwhile
from pathlib import Path
from typing import Final

from fedalt.data.encodings import BOM, wide_encoding
from fedalt.data.tables import PARQUET, SAVED, UNREADABLE, Table, opened, told_delimiter

LOOK: Final = 65536  # bytes by which a file is recognised
WANTED: Final = (
    'expected JSON lines, one object per line such as {"instruction": "...", "output": "..."}, '
    "or a table (CSV, TSV, Parquet)"
)

_PANDAS = (
    'python -c "import pandas, sys; pandas.read_{kind}(sys.argv[1]).to_json(sys.argv[2], '
    "orient='records', lines=True)\" {file} {lines}"
)
# What a file begins with, what it is then, and how it is converted; "" where it cannot be.
_BEGINS: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"ARROW1", "an Arrow file", _PANDAS.replace("{kind}", "feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream", ""),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file", ""),
    (b"BZh", "a bzip2 archive", "bunzip2 {file}"),
    (b"\xfd7zXZ\0", "an xz archive", "unxz {file}"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unzstd {file}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {file}"),
    (b"GGUF", "a GGUF model", ""),
    (b"%PDF", "a PDF", ""),
    (b"SQLite format 3\0", "an SQLite database", ""),
    (b"\x89HDF\r\n", "an HDF5 file", ""),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"\x80\x02", "a Python pickle", ""),
    (b"\x80\x03", "a Python pickle", ""),
    (b"\x80\x04", "a Python pickle", ""),
    (b"\x80\x05", "a Python pickle", ""),
    (b"Obj\x01", "Avro", ""),
    (b"{\\rtf", "rich text (RTF)", ""),
    (b"\x89PNG", "a picture", ""),
    (b"\xff\xd8\xff", "a picture", ""),
)
_DELIMITERS: Final = {"\t": "TSV", ",": "CSV", ";": "CSV with semicolons"}
# What a text that nothing else tells apart is called by the end of its file's name.
_SUFFIXES: Final = {
    ".yaml": "YAML",
    ".yml": "YAML",
    ".xml": "XML",
    ".html": "a web page",
    ".txt": "plain text",
    ".md": "plain text",
}


def other_format(file: Path, begin: bytes | None = None) -> str | None:
    """What a file is, and how it becomes JSON lines, in a sentence; None if it may be JSON lines.

    `begin` are its first LOOK bytes, if they have been read. Content counts more than the name. A
    file that cannot be read is not recognised: whoever reads it says why.
    """
    if begin is None:
        try:
            with opened(file) as stream:
                begin = stream.read(LOOK)
        except UNREADABLE:
            return None
    if (wide := wide_encoding(begin)) is not None:
        return f"the text is {wide}, not UTF-8; save it as UTF-8"
    if table_of(file, begin) is not None:
        return None
    format_ = _binary(file, begin) or _text(file, begin)
    if format_ is None:
        return None
    name, how = format_
    lines = file.with_suffix(".jsonl") if file.suffix != ".jsonl" else Path("converted.jsonl")
    command = how.replace("{lines}", shlex.quote(str(lines)))
    command = command.replace("{file}", shlex.quote(str(file)))
    if how:
        return f"{name} is not read yet; {WANTED}; convert with `{command}`"
    return f"this is {name}, which is not read; {WANTED}"


def _binary(file: Path, begin: bytes) -> tuple[str, str] | None:
    """A file that is no text, by what it begins with."""
    if begin.startswith(b"PK\x03\x04"):
        return _zipped(file)
    for start, name, how in _BEGINS:
        if begin.startswith(start):
            return name, how
    if begin[8:9] == b"{" and b"\0" in begin[:8]:
        return "a model's weights (safetensors)", ""
    if b"\0" in begin and not begin.removeprefix(BOM).lstrip().startswith((b"{", b"[")):
        return "a binary file", ""
    return None


def _zipped(file: Path) -> tuple[str, str]:
    """A ZIP archive, or what is one inside."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        names = []
    if any(name.startswith("xl/") for name in names) or file.suffix == ".xlsx":
        return "an Excel workbook", _PANDAS.replace("{kind}", "excel")
    if any(name.startswith("word/") for name in names):
        return "a Word document", ""
    if any(name.endswith("data.pkl") for name in names):
        return "a model's weights (PyTorch)", ""
    return "a ZIP archive", "unzip {file}"


def _text(file: Path, begin: bytes) -> tuple[str, str] | None:
    """A text that is no JSON lines; a file of JSON lines with broken lines is none of these."""
    text = begin.removeprefix(BOM).decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    start = text.lstrip()[:1]
    if start in ("{", "["):
        return _printed(text, lines[0]) if start == "{" else None
    if any(line.lstrip().startswith("{") for line in lines[:5]):
        return None
    if text.lstrip()[:5].lower() in ("<html", "<!doc", "<?xml"):
        return "a web page or XML", ""
    name = _SUFFIXES.get(file.suffix.lower())
    return None if name is None or not lines else (name, "")


def table_of(file: Path, begin: bytes) -> Table | None:
    """What kind of table a file is that begins like this; None if it is none.

    A text is one if its first rows have equally many cells, at least two, or if its name says so.
    """
    if file.is_dir():
        return Table(SAVED)
    if begin.startswith(b"PAR1"):
        return Table(PARQUET)
    if b"\0" in begin or _binary(file, begin) is not None:
        return None
    text = begin.removeprefix(BOM).decode(errors="replace")
    lines = list(dropwhile(str.isspace, text.splitlines(keepends=True)))
    if lines and (told := told_delimiter(lines[0].strip("\r\n"))) in _DELIMITERS:
        return Table(_DELIMITERS[told], told)
    named = [suffix for suffix in file.suffixes if suffix.lower() in (".csv", ".tsv")]
    # A cell may begin like JSON; where the name says what it is, the first line alone tells.
    looked = [line.lstrip() for line in lines if line.strip()][: 1 if named else 5]
    if not looked or any(line[0] in "{[" for line in looked):
        return None
    heads: dict[str, int] = {}
    for delimiter, name in _DELIMITERS.items():
        rows = [row for row in csv.reader(lines[:6], delimiter=delimiter) if row]
        heads[delimiter] = len(rows[0])
        rows = rows[:-1] if len(rows) > 2 else rows  # a cell may go on where the look ends
        widths = {len(row) for row in rows}
        if (len(rows) > 1 or named) and len(widths) == 1 and min(widths) > 1:
            return Table(name, delimiter)
    if not named:
        return None
    # The rows look unlike, as where the first cell has many lines: the names tell.
    delimiter = "\t" if named[-1].lower() == ".tsv" else max(",;", key=heads.__getitem__)
    return Table(_DELIMITERS[delimiter], delimiter)


def _printed(text: str, first: str) -> tuple[str, str] | None:
    """JSON objects that are printed over several lines."""
    try:
        json.loads(first)
        return None
    except RecursionError:  # whoever reads this line says so
        return None
    except ValueError:
        pass
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        # A whole that is longer than the look: its first line is then an open bracket at most.
        if first.strip() != "{":
            return None
        end = len(text)
    if "\n" not in text.lstrip()[:end].strip():
        return None
    return "JSON that is printed over several lines", "jq -c . {file} > {lines}"
