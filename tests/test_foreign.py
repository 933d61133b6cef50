"""Text that others chose: shown without what a terminal, a log or a page would obey."""

import io
import json
import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from commands import call
from federations import founded
from rich.console import Console
from runs_for_tests import save_model, write_clients

from fedalt.cli import errors as faults
from fedalt.cli.output import console, note, tell
from fedalt.core.codec import decode, encode
from fedalt.core.foreign import LONGEST, listed, shown, shown_lines, shown_message
from fedalt.data.names import fault_of_names
from fedalt.engine.firewall import Refused
from fedalt.federation.messages import Answer
from fedalt.flower.client_process import _why
from fedalt.report.live import Live
from fedalt.report.live_drawing import draw_run
from fedalt.report.numbers import numbers_of
from fedalt.report.sheet import Sheet
from fedalt.report.table import run_table, to_markdown

NASTY = {
    "a colour": "\x1b[31mred\x1b[0m",
    "a title": "\x1b]0;owned\x07",
    "C1": "\x9b31m",
    "a line": "a\n12:00:00  round 9: all is well",
    "a carriage return": "a\rerror: b",
    "other line ends": "a\u2028b\u2029c\x0bd\x85e",
    "nothing": "a\x00b",
    "bidirectional": "\u202egnp.exe\u202c\u2066x\u2069",
    "no width": "ad\u200bmin\ufeff\u2060\u00ad\u115f\u3164\u034f",
    "half a pair": "a\ud800b",
    "a tag": "a\U000e0041b",
    "backspace": "abc\b\b\bxyz\x7f",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_a_line_has_nothing_that_is_obeyed_or_hidden(text: str) -> None:
    for clean in (shown(text), str(Refused(text)), listed([text])):
        assert clean.isprintable()
        assert not {unicodedata.category(each) for each in clean} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        clean.encode("utf-8")
    assert shown("kept: ä 漢 🙂 [b] :smile:") == "kept: ä 漢 🙂 [b] :smile:"


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_lines_keep_their_ends_and_no_more(text: str) -> None:
    clean = shown_lines(text)
    assert all(each == "\n" or each.isprintable() for each in clean)
    assert all(line.startswith("  ") for line in shown_message(text).splitlines()[1:])
    assert shown_lines("می\u200cخواهم\n\tx") == "می\u200cخواهم\n\tx"


def test_what_is_long_is_cut() -> None:
    for text in ("x" * 10**7, "\x1b" * 10**7):
        assert len(shown(text)) == LONGEST + 3
        assert len(shown_message(text)) < 100_000
    assert listed(map(str, range(9))) == "0, 1, 2, 3, 4 and 4 more"


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_notes_results_and_errors_are_clean(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    note(text)
    tell(text)
    faults.report(OSError(2, text, text))
    faults.report(RuntimeError(text))
    said = capsys.readouterr()
    assert all(each == "\n" or each.isprintable() for each in said.out + said.err)
    forged = [line for line in said.err.splitlines() if line.startswith(("12:00", "error: b"))]
    assert forged == []


MARKUP = ("[urgent]", "[/later]", "[bold red]x", "[link=https://x]y", ":smile:", "<script>", "a|b")


def drawn(what: object, width: int = 100) -> str:
    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    out.print(what)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize("text", MARKUP)
def test_no_text_is_markup_in_a_table_a_frame_or_a_console(text: str, tmp_path: Path) -> None:
    assert text in drawn(Sheet(("client", "score"), [[text, "1.0"]], title=text))
    frame = Live(tmp_path / "r", text, "training", 0, 2, 0, None, 0.0, {}, (), (text,), None)
    assert drawn(draw_run(frame, rows=40, now=0.0)).count(text) == 2
    out = console()
    with out.capture() as seen:
        out.print(text)
    assert seen.get().strip() == text


@pytest.mark.parametrize("text", [*MARKUP, *NASTY.values()])
def test_a_markdown_cell_stays_one_cell(text: str) -> None:
    score = {"kind": "score", "split": "test", "round": 0, "column": "own"}
    table = run_table([{**score, "client": text, "metrics": {"loss": 1.0}}])
    lines = to_markdown(table).splitlines()
    assert len(lines) == 5
    assert "<script" not in lines[2]
    assert len(lines[2].replace("\\|", "").split("|")) == len(lines[0].split("|"))


def test_names_of_metrics_are_clean_at_trackers() -> None:
    line = {"kind": "train", "column": "own", "client": "a", "upload_bytes": 1}
    names = [name for name, _ in numbers_of({**line, "metrics": dict.fromkeys(NASTY.values(), 1)})]
    assert all(name.isprintable() for name in names)


LONG_NAMES = {"anna-of-a-very-long-name": 12.345, "[b]": 100.0}


def test_at_thirty_columns_no_name_and_no_score_is_cut() -> None:
    score = {"kind": "score", "split": "test", "round": 0}
    lines = [
        {**score, "column": column, "client": name, "metrics": {"accuracy": value / 100, "loss": 1}}
        for name, value in LONG_NAMES.items()
        for column in ("own", "shared", "local")
    ]
    from fedalt.report.table import draw

    narrow, wide = (drawn(draw(run_table(lines), "a run"), width) for width in (30, 100))
    assert max(map(len, narrow.splitlines())) <= 30
    for word in (*LONG_NAMES, "worst client", "gain over local +0.0", "12.3", "100.0"):
        assert word in narrow
        assert word.removesuffix(" +0.0") in wide
    assert "…" not in narrow + wide


def labelled(folder: Path, labels: tuple[str, str]) -> Path:
    folder.mkdir()
    for client in ("anna", "ben"):
        for split in ("train", "test"):
            rows = [{"text": f"text {n} {client}", "label": labels[n % 2]} for n in range(24)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{client}.{split}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("columns", ["30", "120"])
@pytest.mark.parametrize("label", MARKUP)
def test_data_check_shows_labels_as_they_are(
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    label: str,
    columns: str,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    folder = labelled(tmp_path / "d", (label, "other"))
    (folder / "notes\x1b[31m\nerror: forged.txt").write_text("x")
    (folder / b"bad\xff.txt".decode(errors="surrogateescape")).write_text("x")
    page = tmp_path / "page.html"
    assert call("data", "check", folder, "--model", tiny_model_dir, "--html", page) == 0
    said = capsys.readouterr()
    assert label in said.out.replace("\n", "").replace("  ", "") or label in said.out
    assert {"anna", "ben"} <= set(said.out.split())
    assert "\x1b" not in said.out + said.err
    assert not any(line.startswith("error") for line in said.err.splitlines())
    text = page.read_text(encoding="utf-8")
    assert "\x1b" not in text
    if label == "<script>":
        assert "<script>," not in text
        assert "&lt;script&gt;" in text


@pytest.mark.parametrize(
    "labels",
    [
        ("Spam", "spam"),
        ("caf\u00e9", "cafe\u0301"),
        ("a b", "a  b"),
        ("\ufb01n", "fin"),
        ("1", "01"),
    ],
)
def test_labels_that_look_like_one_are_told(
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    labels: tuple[str, str],
) -> None:
    folder = labelled(tmp_path / "d", labels)
    assert call("data", "check", folder, "--model", tiny_model_dir) == 0
    assert "are two, but differ only in case" in capsys.readouterr().err
    other = labelled(tmp_path / "other", ("spam", "ham"))
    assert call("data", "check", other, "--model", tiny_model_dir) == 0
    assert "are two, but" not in capsys.readouterr().err


BAD_NAMES = {
    "too long": f"{'x' * 101},b",
    "a tag": "<b>,c",
    "an escape": "a\x1b[31m,b",
    "a line": "a\nb,c",
    "markup": "[a],b",
    "a path": "../a,b",
    "hidden": ".a,b",
    "case": "Anna,anna",
    "twice": "anna,anna",
    "none": ",",
    "not ASCII": "andré,b",
}


@pytest.mark.parametrize("names", BAD_NAMES.values(), ids=BAD_NAMES)
def test_init_refuses_such_names_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str
) -> None:
    assert call("federation", "init", tmp_path / "f", "--clients", names) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: client")
    assert said.strip().isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_a_file_that_somebody_sent_is_checked_too(tmp_path: Path, model: Path) -> None:
    from fedalt.federation.agreement import read_agreement
    from fedalt.flower.config import read_client_config

    made = founded(tmp_path, model)
    file = made.client("a") / "terms.toml"
    whole = file.read_text()
    for old, new in (('"a"', '"A\\u001b[31m"'), ('"a"', '"B"'), ('"letters"', '"a\\nb"')):
        file.write_text(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"terms.toml: \[federation\] (client|name)") as error:
            read_agreement(file)
        assert str(error.value).isprintable()
    file.write_text(whole)
    config = made.client("a") / "client.toml"
    config.write_text(config.read_text().replace('"a"', '"../a"'))
    with pytest.raises(ValueError, match=r"client.toml: \[client\] client '../a'"):
        read_client_config(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_init_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedalt.flower import init as found

    def full(secret: Path, public: Path) -> None:
        if public.stem == "b":
            raise OSError(28, "No space left on device", str(secret))
        secret.write_text("key")

    monkeypatch.setattr(found, "make_client_key", full)
    before = write_clients(tmp_path / "all")
    with pytest.raises(OSError, match="No space left") as error:
        founded(tmp_path, model)
    assert error.value.filename == str(tmp_path / "federation")
    assert sorted(tmp_path.iterdir()) == [before]


def test_init_in_an_empty_folder_that_is_there(tmp_path: Path, model: Path) -> None:
    (tmp_path / "federation").mkdir()
    made = founded(tmp_path, model)
    assert made.client("a").is_dir()
    assert not list(tmp_path.glob(".*"))


def test_names_of_data_files_and_of_a_federation_have_one_rule() -> None:
    assert fault_of_names(["a", "B-2", "_x", "x" * 100]) == ""
    assert "at most 100 letters" in fault_of_names(["x" * 101])
    assert "at most 100 letters" in fault_of_names(["a."])


@pytest.mark.parametrize("text", [*NASTY.values(), "x" * 10**7], ids=[*NASTY, "long"])
def test_what_a_client_says_reaches_log_and_status_clean(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    from fedalt.flower.config import read_server_config
    from fedalt.flower.status import shown as status

    monkeypatch.setattr("fedalt.federation.round_collector._REST", 0.0)
    made = founded(tmp_path, model, rounds={"rounds": 1, "test": False})
    left = [1]
    sent = text.encode("utf-8", "replace").decode()  # half a pair cannot be sent

    def spoil(client_id: str, answer: bytes) -> bytes:
        if client_id == "a" and left[0]:
            left[0] -= 1
            return encode(replace(decode(Answer, answer), upload=None, error=sent))
        return answer

    made.go_on(spoil)
    log = (made.root / "server" / "state" / "logs" / "server.log").read_text()
    assert all(line.isprintable() and len(line) < 1100 for line in log.split("\n"))
    assert not any(line.startswith("12:00") for line in log.split("\n"))
    assert "round 1: a: " in log
    config = read_server_config(made.root / "server" / "federation.toml")
    seen = status(config.place, config.terms)
    assert all(line.isprintable() for line in seen.split("\n"))


def test_what_a_server_answers_reaches_a_client_clean(tmp_path: Path) -> None:
    log = tmp_path / "link.log"
    for text in NASTY.values():
        body = text.replace("\n", " ").encode("utf-8", "replace").decode()
        log.write_text(f"httpx.HTTPError: 500 {body}{'x' * 10**6}\n")
        assert len(shown(_why(log), 600)) <= 603
        assert shown(_why(log), 600).isprintable()


@pytest.mark.parametrize("level", ["1", "2"])
def test_python_without_asserts_and_docstrings_says_as_much(level: str) -> None:
    environment = {**os.environ, "PYTHONOPTIMIZE": level, "COLUMNS": "100"}
    for words, told in (
        (["--help"], "Train one better model per client"),
        (["data", "--help"], "Measure every client's data"),
        (["federation", "--help"], "Make a folder for the server"),
        (["methods"], "fedalt            FedALT: an individual adapter"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "fedalt", *words],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert told in ended.stdout


@pytest.mark.parametrize("words", [["runn"], ["federation", "inti"], ["data", "chek"]])
def test_a_suggestion_is_made_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    assert capsys.readouterr().err.count("Did you mean") == 1
