"""The README of an exported folder holds code that runs and asks as the client was trained."""

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import letters
from data_files import CHAT_TEMPLATE
from runs_for_tests import settings_for
from tiny import llama, llama_classifier
from tokenizers.processors import TemplateProcessing

import fedalt
from fedalt.adapters.plan import HEAD, single
from fedalt.api import Run
from fedalt.core import tree as trees
from fedalt.export.card import card
from fedalt.export.folders import export_individual
from fedalt.methods.contract import Serving
from fedalt.runs.answers import Served, answers, served
from fedalt.runs.settings import to_toml

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
# Too long for 64 positions and an answer, or brings its own begin of text.
HARD = (*QUESTIONS, "ask " * 30, "<s>ask 3")
# Tells the day, and ends turns with a token that decoding does not leave out by itself.
DATED = (
    "<s>{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def save_plain(folder: Path) -> None:
    llama().save_pretrained(folder)
    tokenizer = letters()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def save_chat(folder: Path) -> None:
    """A chat model as they are published: ends, a penalty, a day, a begin and an end of text."""
    model = llama()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(folder)
    card_ = {"eos_token_id": [2, 64, 11], "repetition_penalty": 1.9, "no_repeat_ngram_size": 2}
    (folder / "generation_config.json").write_text(json.dumps(card_))
    tokenizer = letters()
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)


def run_of(folder: Path, form: str, save: Callable[[Path], None] = save_plain) -> Run:
    model, data = folder / "model", folder / "data"
    save(model)
    data.mkdir()
    for client in ("a", "b"):
        text = "".join(json.dumps(RECORDS[form](n)) + "\n" for n in range(8))
        (data / f"{client}.train.jsonl").write_text(text)
    template = folder / "template.txt"
    template.write_text("{{\"}}: {instruction}\n{input}\n'")
    sections = {} if save is save_plain else {"scoring": {"max_new_tokens": 12}}
    settings = settings_for(model, data, rounds={"rounds": 6}, training={"lr": 5e-2}, **sections)
    table = tomllib.loads(to_toml(settings))
    if form == "instruction":
        table["data"]["template"] = str(template)
    return fedalt.run(table, out=folder / "run")


def individual(of: Served, folder: Path) -> Path:
    """Client b's adapter alone, exported with its card."""
    readme = card(of, "b", "individual")
    return export_individual(of.serving, of.parts.base, folder / "lone", readme=readme)


def printed_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys, questions=QUESTIONS
) -> list[str]:
    """What the README's code prints about each question, run in the folder."""
    readme = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(folder)
    found = []
    for question in questions:
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
    lone = individual(of, tmp_path)
    alone = printed_by(lone, monkeypatch, capsys)
    if form == "text":
        assert {*told, *alone} <= {"bad", "good"}
    else:
        assert told == [run.generate("b", question) for question in QUESTIONS]
        assert any(told)
        assert any(alone)


def save_classifier(folder: Path) -> None:
    """A classifier for three labels, which the data's two take the place of."""
    llama_classifier().save_pretrained(folder)
    letters().save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_code_of_the_card_puts_a_head_in_the_place_of_one_for_other_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    of = served(run_of(tmp_path, "text", save_classifier).path, "b")
    lone = individual(of, tmp_path)
    assert {*printed_by(lone, monkeypatch, capsys)} <= {"bad", "good"}


def save_half(folder: Path) -> None:
    """A base model of lower precision than a CPU computes with."""
    save_plain(folder)
    llama().bfloat16().save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_code_of_the_card_computes_as_precisely_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    of = served(run_of(tmp_path, "prompt", save_half).path, "b")
    lone = individual(of, tmp_path)
    alone = replace(of, serving=only_first(of.serving))
    (code,) = re.findall(r"```python\n(.*?)```", (lone / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(lone)
    seen: dict[str, Any] = {}
    exec(code.replace('"..."', "'ask 3'"), seen)
    assert seen["base"].dtype == of.parts.base.adapted.model.dtype == torch.float32
    assert capsys.readouterr().out == f"{answers(alone, ['ask 3'])[0]}\n"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["instruction", "prompt", "messages"])
def test_the_code_of_the_card_asks_a_chat_model_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, form: str
) -> None:
    run = run_of(tmp_path, form, save_chat)
    told = printed_by(run.export("b", tmp_path / "mine"), monkeypatch, capsys, HARD)
    assert told == [run.generate("b", question) for question in HARD]
    of = served(run.path, "b")
    alone = replace(of, serving=only_first(of.serving))
    lone = individual(of, tmp_path)
    assert printed_by(lone, monkeypatch, capsys, HARD) == answers(alone, HARD)


def only_first(serving: Serving) -> Serving:
    """What `export_individual` writes of a serving."""
    slot = serving.plan.slots[0]
    return Serving(single(slot), trees.select(serving.tree, slot.name, HEAD))
