"""The README of an exported folder holds code that runs and asks as the client was trained."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from bases import letters
from data_files import CHAT_TEMPLATE
from runs_for_tests import settings_for
from tiny import llama

import fedalt
from fedalt.answers import served
from fedalt.api import Run
from fedalt.export.card import card
from fedalt.export.folders import export_individual
from fedalt.settings import to_toml

RECORDS = {
    "instruction": lambda n: {"instruction": f"ask {n}", "output": "yes"},
    "prompt": lambda n: {"prompt": f"ask {n}", "completion": "yes"},
    "messages": lambda n: {
        "messages": [
            {"role": "user", "content": f"ask {n}"},
            {"role": "assistant", "content": "yes"},
        ]
    },
    "text": lambda n: {"text": f"ask {n}", "label": ["bad", "good"][n % 2]},
}


QUESTIONS = ("ask 3", "a", "what is it", "0")


def run_of(folder: Path, form: str) -> Run:
    model, data = folder / "model", folder / "data"
    llama().save_pretrained(model)
    tokenizer = letters()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    data.mkdir()
    for client in ("a", "b"):
        text = "".join(json.dumps(RECORDS[form](n)) + "\n" for n in range(8))
        (data / f"{client}.train.jsonl").write_text(text)
    template = folder / "template.txt"
    template.write_text("{{\"}}: {instruction}\n{input}\n'")
    settings = settings_for(model, data, rounds={"rounds": 6}, training={"lr": 5e-2})
    table = tomllib.loads(to_toml(settings))
    if form == "instruction":
        table["data"]["template"] = str(template)
    return fedalt.run(table, out=folder / "run")


def printed_by(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> list[str]:
    """What the README's code prints about each question, run in the folder."""
    readme = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(folder)
    found = []
    for question in QUESTIONS:
        capsys.readouterr()
        exec(code.replace('"..."', repr(question)), {})
        found.append(capsys.readouterr().out.removesuffix("\n"))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", RECORDS)
def test_the_code_of_the_card_answers_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, form: str
) -> None:
    run = run_of(tmp_path, form)
    told = printed_by(run.export("b", tmp_path / "mine"), monkeypatch, capsys)
    of = served(run.path, "b")
    lone = export_individual(
        of.serving, of.parts.base, tmp_path / "lone", readme=card(of, "b", "individual")
    )
    alone = printed_by(lone, monkeypatch, capsys)
    if form == "text":
        assert {*told, *alone} <= {"bad", "good"}
    else:
        assert told == [run.generate("b", question) for question in QUESTIONS]
        assert any(told)
        assert any(alone)
