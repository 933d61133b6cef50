"""`fedalt chat` on a real terminal, and through a pipe."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pexpect
import torch
from commands import call
from runs_for_tests import save_model, settings_for

from fedalt.evaluation import generate
from fedalt.evaluation.gate_statistics import weights_of
from fedalt.runs.answers import answers, prompt_of, served
from fedalt.runs.lifecycle import start_run
from fedalt.runs.setup import prepare

FEDALT = str(Path(sys.executable).parent / "fedalt")
RESET = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


def chat(*words, **environment):
    """The command on a terminal of its own."""
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    return pexpect.spawn(
        FEDALT,
        ["chat", *map(str, words)],
        dimensions=(60, 120),
        encoding="utf-8",
        timeout=240,
        env={**env, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment},
    )


def shown(screen, upto):
    """What the terminal shows until something appears, and with colours."""
    screen.expect_exact(upto)
    return RESET.sub("", screen.before), screen.before


def row_of(text):
    """The answers, from the one row of the table."""
    (row,) = re.findall(r"^│(.*)│ *$", text, re.MULTILINE)
    return [cell.strip() for cell in row.split("│")]


def test_three_models_answer_side_by_side_and_each_token_has_its_weight(finished_run):
    screen = chat(finished_run)
    listed, _ = shown(screen, "client: ")
    assert re.findall(r"(\d) +(\w)", listed) == [("1", "a"), ("2", "b"), ("3", "c")]
    screen.sendline("9")
    screen.expect_exact("neither a client nor a number of 1 to 3")
    screen.sendline("2")
    screen.expect_exact("b: a question")
    for client in ("b", "c"):
        screen.expect_exact("> ")
        if client == "c":
            screen.sendline("/client nobody")
            screen.expect_exact("no client 'nobody', but a, b, c")
            screen.expect_exact("> ")
            screen.sendline("/client c")
            screen.expect_exact("c: a question")
            screen.expect_exact("> ")
        screen.sendline(f"ask 5{client}")
        plain, coloured = shown(screen, "> ")
        screen.send("")
        assert re.search(r"own +┃ shared part +┃ base model", plain)
        own, shared = (served(finished_run, client, column) for column in ("own", "shared"))
        base, scoring = own.parts.base, own.parts.settings.scoring
        prompt = prompt_of(own, f"ask 5{client}")
        expected = [answers(each, [f"ask 5{client}"])[0] for each in (own, shared)]
        expected += generate(base, None, [prompt], scoring)
        assert row_of(plain) == [" ".join(each.split("\n")) for each in expected]
        assert "weight of individual, the mean over sites:  0%  25%  50%  75%  100% " in plain
        weights = weights_of(base, own.serving, prompt)[:, 0]
        warm = weights[4] > 0.5  # the I of Instruction, after four signs that are not known
        red, _, blue = map(int, re.search(r"48;2;(\d+);(\d+);(\d+)mI", coloured).groups())
        assert (red > blue) == warm
        screen.sendline("/nonsense")
        screen.expect_exact("there is no /nonsense")
    screen.sendline("/quit")
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 0


def test_without_colours_the_weights_are_numbers_and_ctrl_d_ends(finished_run):
    screen = chat(finished_run, "--client", "a", NO_COLOR="1")
    screen.expect_exact("> ")
    screen.sendline("ask 5a")
    plain, _ = shown(screen, "> ")
    own = served(finished_run, "a")
    weights = weights_of(own.parts.base, own.serving, prompt_of(own, "ask 5a"))[:, 0]
    assert "percent behind each token" in plain
    assert f"I[{weights[4]:.0%}]n[{weights[5]:.0%}]s[{weights[6]:.0%}]" in plain
    screen.sendeof()
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 0


def test_the_base_model_answers_as_if_there_were_no_adapters(finished_run):
    own = served(finished_run, "a")
    base = own.parts.base
    ids = list(prompt_of(own, "ask 5a"))
    (text,) = generate(base, None, [tuple(ids)], own.parts.settings.scoring)
    begin = len(ids)
    with torch.no_grad():
        for _ in range(own.parts.settings.scoring.max_new_tokens):
            ids.append(int(base.adapted.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
    assert text == base.tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()


def test_a_run_that_shares_and_weighs_nothing_has_two_columns_alone(
    tiny_model_dir, clients_dir, tmp_path, monkeypatch, capsys
):
    settings = settings_for(
        tiny_model_dir, clients_dir, method={"name": "local"}, rounds={"rounds": 1, "test": False}
    )
    run = start_run(prepare(settings), tmp_path / "run").path
    monkeypatch.setattr("sys.stdin", io.StringIO("ask 1a\n\nnever asked\n"))
    assert call("chat", run, "--client", "a") == 0
    said = capsys.readouterr().out
    assert re.search(r"┃ own +┃ base model +┃", said)
    assert len(row_of(said)) == 2
    assert "weight" not in said


def test_a_classifiers_run_is_told_that_nothing_is_written(tmp_path, capsys):
    model = tmp_path / "model"
    save_model(model)
    data = tmp_path / "data"
    data.mkdir()
    records = [{"text": f"text {n}", "label": "good" if n % 2 else "bad"} for n in range(6)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    for file in ("a.train.jsonl", "b.train.jsonl", "a.test.jsonl"):
        (data / file).write_text(text)
    run = start_run(prepare(settings_for(model, data, rounds={"rounds": 1})), tmp_path / "run").path
    lines = [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert {line["prediction"] for line in lines} <= {"good", "bad"}
    assert all(len(line["tokens"]) > 5 for line in lines)
    assert call("chat", run, "--client", "a") == 2
    assert "no text is generated" in capsys.readouterr().err


def test_a_client_that_is_not_there_and_a_folder_that_is_no_run_are_named(
    finished_run, tmp_path, capsys
):
    assert call("chat", finished_run, "--client", "nobody") == 2
    assert "no client 'nobody', but a, b, c" in capsys.readouterr().err
    assert call("chat", tmp_path) == 2
    assert "is not a run's folder" in capsys.readouterr().err
