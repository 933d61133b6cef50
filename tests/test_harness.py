"""A client's model through lm-evaluation-harness, on local task files alone."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import call

from fedalt.evaluation import Scoring, generate
from fedalt.runs import harness
from fedalt.runs.answers import served
from fedalt.runs.harness import HarnessError, load_tasks, measure

DOCS = [{"question": f"is {n} even", "answer": ("yes", "no")[n % 2]} for n in range(6)]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
target_delimiter: " "
"""
TASKS = {
    "told": "output_type: loglikelihood\ndoc_to_target: ' {{answer}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "chosen": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\n"
    "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n",
    "written": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="`pip install 'fedalt[lm-eval]'` has not been called")
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in DOCS))
    for name, own in TASKS.items():
        text = f"task: {name}\n{COMMON.replace('DATA', str(data))}{own}"
        (folder / f"{name}.yaml").write_text(text)
    lost = COMMON.replace("DATA", str(folder / "nowhere.jsonl"))
    (folder / "lost.yaml").write_text(f"task: lost\n{lost}{TASKS['told']}")
    return folder


@torch.no_grad()
def losses_of(of, answer):
    """What each answer costs behind its question, in nats, by the model as the client uses it."""
    tokenizer, losses = of.parts.base.tokenizer, []
    with of.parts.base.adapted.bound(of.serving.plan, of.serving.tree) as model:
        for line in DOCS:
            asked = tokenizer(line["question"]).input_ids
            whole = tokenizer(f"{line['question']} {answer(line)}").input_ids
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            told = range(len(asked), len(whole))
            losses.append(-sum(float(logs[at - 1, whole[at]]) for at in told))
    return losses


def test_the_harness_asks_the_model_that_the_client_uses(finished_run, tasks):
    of = served(finished_run, "b")
    found = measure(of, load_tasks(list(TASKS), tasks))
    values = {(each.task, each.metric): each.value for each in found}
    right = losses_of(of, lambda line: line["answer"])
    assert values["told", "perplexity"] == pytest.approx(math.exp(sum(right) / 6), rel=1e-4)
    yes, no = (losses_of(of, lambda line, word=word: word) for word in ("yes", "no"))
    wanted = [
        (("yes", "no")[y > n]) == line["answer"] for y, n, line in zip(yes, no, DOCS, strict=True)
    ]
    assert values["chosen", "acc"] == pytest.approx(sum(wanted) / 6)
    assert ("written", "exact_match") in values


def test_the_command_prints_it_beside_its_own_scores(finished_run, tasks, capsys):
    flags = ("--lm-eval", "told,chosen", "--include-path", tasks)
    assert call("evaluate", finished_run, "--client", "b", *flags, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["scores"]["clients"]) == ["b"]
    assert {each["task"] for each in told["lm_eval"]} == {"told", "chosen"}
    assert call("evaluate", finished_run, "--client", "b", *flags) == 0
    said = capsys.readouterr().out
    assert "lm-evaluation-harness" in said
    assert "perplexity" in said


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--lm-eval", "tolt"], "--lm-eval tolt: neither a task of"),
        (["--lm-eval", "lost"], "--lm-eval lost: cannot be loaded: "),
        (["--lm-eval", "told", "--include-path", "none"], "--include-path none: expected a folder"),
        (["--include-path", "."], "say something of --lm-eval"),
    ],
)
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(
    finished_run, tasks, capsys, flags, wanted, monkeypatch
):
    monkeypatch.setattr("fedalt.runs.lifecycle.reopen", None)
    given = flags if "--include-path" in flags else [*flags, "--include-path", tasks]
    assert call("evaluate", finished_run, "--client", "b", *given) == 2
    said = capsys.readouterr().err
    assert wanted in said
    assert "Traceback" not in said


def test_the_client_has_to_be_named_before_anything_is_scored(
    finished_run, tasks, capsys, monkeypatch
):
    monkeypatch.setattr("fedalt.runs.lifecycle.reopen", None)
    given = ("--lm-eval", "told", "--include-path", tasks)
    assert call("evaluate", finished_run, *given) == 2
    assert "has several clients: name one of a, b" in capsys.readouterr().err


def test_what_cannot_be_asked_is_told_before_anything_is_scored(
    run_flags, tmp_path, tasks, capsys, monkeypatch
):
    run = tmp_path / "run"
    flags = ("--method", "feddpa", "--rounds", 2, "--out", run, "--quiet")
    assert call("run", *run_flags, *flags) == 0
    monkeypatch.setattr("fedalt.runs.lifecycle.evaluate", None)
    given = ("--lm-eval", "told", "--include-path", tasks)
    assert call("evaluate", run, "--client", "b", *given) == 2
    assert "this client weighs its adapters anew for every prompt" in capsys.readouterr().err


def test_without_the_package_an_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(HarnessError, match=r"pip install 'fedalt\[lm-eval\]'"):
        load_tasks(["told"], None)


def test_whoever_asks_within_it_finds_neither_penalties_nor_today(finished_run, monkeypatch):
    class Harness(SimpleNamespace):
        """Asks as HFLM does, which is not at hand everywhere."""

    def evaluate(asked, tasks, **how):
        turns = [{"role": "user", "content": "ask 3b"}]
        prompt = asked.tokenizer.apply_chat_template(turns, tokenize=False)
        ids = torch.tensor([asked.tokenizer(prompt).input_ids])
        written = asked.pretrained.generate(ids, max_new_tokens=12, use_cache=True)
        told.append((prompt, written[0, ids.shape[1] :].tolist()))
        return {"results": {}}

    told = []
    model = SimpleNamespace(HFLM=Harness)
    for name, module in (("", SimpleNamespace(evaluate=evaluate)), (".models", SimpleNamespace())):
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", model)
    of = replace(served(finished_run, "b"), form="messages")
    base = of.parts.base
    card = base.adapted.model.generation_config
    card.repetition_penalty, card.max_length, card.suppress_tokens = 1.9, 5, [20]
    template = "{{ strftime_now('%Y') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    base.tokenizer.chat_template = template
    measure(of, {"tasks": {}})
    assert base.adapted.model.generation_config is card
    assert base.tokenizer.chat_template == template
    ((prompt, written),) = told
    assert prompt == "2024 ask 3b"
    asked = tuple(base.tokenizer(prompt).input_ids)
    wanted = generate(base, of.serving, [asked], Scoring(max_new_tokens=12))
    assert base.tokenizer.decode(written, skip_special_tokens=True).strip() == wanted[0]
