"""Text in the encodings of Windows' editors, wherever a user gives text."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from data_files import asked

from fedalt.cli.typed import next_lines, piped_lines
from fedalt.data.encodings import EncodingError, decoded
from fedalt.data.folder import open_data
from fedalt.data.prompts import read_template
from fedalt.data.records import DataError
from fedalt.runs.settings import SettingsError, read_settings

TEXT = "naïve café, déjà vu: 3 of 4\r\nand a second line\r\n"
OTHERS = {
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16 (little-endian)",
    "utf-16-be": "UTF-16 (big-endian)",
    "utf-32-le": "UTF-32 (little-endian)",
    "utf-32-be": "UTF-32 (big-endian)",
    "cp1252": "Windows-1252",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_with_a_mark_and_without(encoding):
    assert decoded(TEXT.encode(encoding)) == TEXT


@pytest.mark.parametrize(("encoding", "name"), OTHERS.items())
def test_another_encoding_is_named(encoding, name):
    with pytest.raises(EncodingError) as caught:
        decoded(TEXT.encode(encoding))
    assert name in str(caught.value)


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "shift_jis", "gb18030", "euc-kr"])
def test_texts_of_other_scripts_are_not_called_western(encoding):
    text = {"c": "Париж — столица", "k": "Париж столица"}.get(encoding[0], "東京は首都")
    text = "서울은 수도" if encoding == "euc-kr" else text
    with pytest.raises(EncodingError, match="of one language"):
        decoded(text.encode(encoding))


def test_texts_in_utf8_of_any_script_are_no_utf16():
    for text in ("", "a", "ab", "Париж", "東京は首都", "a\0b", "पेरिस"):
        assert decoded(text.encode()) == text


def client_files(folder, encoding):
    lines = [json.dumps(asked(f"café {n}?", "naïve"), ensure_ascii=False) for n in range(12)]
    folder.mkdir()
    (folder / "a.train.jsonl").write_bytes("\r\n".join(lines).encode(encoding))
    return folder


@pytest.mark.parametrize(("encoding", "name"), OTHERS.items())
def test_data_in_another_encoding_are_one_sentence(tmp_path, encoding, name):
    with pytest.raises(DataError) as caught:
        open_data(client_files(tmp_path / "d", encoding))
    said = str(caught.value)
    assert "\n" not in said
    assert "a.train.jsonl" in said
    assert name in said


def test_data_with_a_mark_are_read(tmp_path):
    assert open_data(client_files(tmp_path / "d", "utf-8-sig")).counts("a", "train") == 12


@pytest.mark.parametrize(("encoding", "name"), OTHERS.items())
def test_settings_and_templates_too(tmp_path, encoding, name):
    file = tmp_path / "run.toml"
    file.write_bytes("# café\r\n[data]\r\npath = 'd'\r\n".encode(encoding))
    with pytest.raises(SettingsError, match=name.split()[0]) as caught:
        read_settings(file)
    assert str(file) in str(caught.value)
    file.write_bytes("Réponds : {instruction}\r\n".encode(encoding))
    with pytest.raises(DataError, match=name.split()[0]):
        read_template(file)


def test_settings_and_templates_with_a_mark_are_read(tmp_path):
    file = tmp_path / "run.toml"
    file.write_bytes("[data]\r\npath = 'd'\r\n".encode("utf-8-sig"))
    assert read_settings(file).data.path == tmp_path / "d"
    file.write_bytes("Réponds : {instruction}\r\n".encode("utf-8-sig"))
    assert read_template(file).text == "Réponds : {instruction}\n"


def test_configurations_of_a_federation_too(tmp_path):
    pytest.importorskip("flwr")
    from fedalt.flower.config import read_client_config

    (tmp_path / "client.toml").write_bytes("[client]\nname='a'".encode("utf-16"))
    with pytest.raises(SettingsError, match="UTF-16"):
        read_client_config(tmp_path / "client.toml")


def piped(monkeypatch, raw):
    stream = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)


@pytest.mark.parametrize(("encoding", "name"), OTHERS.items())
def test_questions_on_standard_input_in_another_encoding_are_one_sentence(
    monkeypatch, encoding, name
):
    for read in (piped_lines, lambda: list(next_lines("> "))):
        piped(monkeypatch, "café\n".encode(encoding))
        with pytest.raises(DataError, match=name.split()[0]) as caught:
            read()
        assert str(caught.value).startswith("standard input: ")


def test_questions_with_a_mark_and_with_rare_separators_stay_whole(monkeypatch):
    raw = "\ufeffcafé\u2028au lait\r\n\r\nthé\n".encode()
    piped(monkeypatch, raw)
    assert piped_lines() == ["café\u2028au lait", "", "thé", ""]
    piped(monkeypatch, raw)
    assert list(next_lines("> ")) == ["café\u2028au lait"]


def test_a_question_of_bytes_on_the_command_line_is_one_sentence():
    from fedalt.runs.answers import prompt_of

    with pytest.raises(DataError, match="not UTF-8: character 4"):
        prompt_of(SimpleNamespace(), "caf\udce9")
