"""Whole models as one plain adapter, or merged: exact for fixed weights, measured for mixers."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from bases import base_of, example, random_serving_tree
from commands import call
from exported import IDS, PLANS, serving_for
from exported import base_of as base_on_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalt.adapters.plan import Mixer, Plan, Similarity, Slot, Sum
from fedalt.core import tree as trees
from fedalt.core.settings import Scoring
from fedalt.core.tree import Name
from fedalt.evaluation import score
from fedalt.evaluation.gate_statistics import weights_of
from fedalt.export.card import card
from fedalt.export.fixed import with_fixed_weights
from fedalt.export.folders import export_individual, export_personal
from fedalt.export.merged import export_merged
from fedalt.methods.contract import Serving
from fedalt.runs.answers import served
from fedalt.runs.lifecycle import reopen

TWO = (Slot("individual", 2, 4.0), Slot("rest_of_world", 3, 1.5))


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_slots_of_fixed_weights_are_one_adapter_and_can_be_merged_exactly(kind, tmp_path):
    base = base_on_disk(kind)
    serving = serving_for(base, PLANS["fixed sum"])
    with base.adapted.bound(serving.plan, serving.tree) as model:
        wanted = model(IDS).logits
    fixed = with_fixed_weights(serving, base, (), ())
    assert fixed.note == ""
    (slot,) = fixed.serving.plan.slots
    assert (slot.rank, slot.scaling) == (5, 1.0)
    export_individual(fixed.serving, base, tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(base.name)
    lora = PeftModel.from_pretrained(plain, str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits_of(lora), wanted)
    export_merged(fixed.serving, base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged), wanted)
    assert not torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(base.name)), wanted)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()} == {0o600}


def test_whatever_is_exported_is_for_its_owner_alone_templates_in_a_folder_too(tmp_path):
    base = base_on_disk("llama")
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    base = replace(base, tokenizer=tokenizer)
    serving = serving_for(base, PLANS["single"])
    export_personal(serving, base, tmp_path / "personal", readme="about it")
    export_individual(serving, base, tmp_path / "lora", readme="about it")
    fixed = with_fixed_weights(serving, base, (), ()).serving
    export_merged(fixed, base, tmp_path / "merged", readme="about it")
    for kind in ("personal", "merged"):
        assert (tmp_path / kind / "additional_chat_templates" / "tools.jinja").is_file()
    for path in tmp_path.glob("*/**/*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_mixers_weights_become_their_means_and_the_loss_is_told():
    base = base_of()
    serving = Serving(Plan(TWO, Mixer()), random_serving_tree(base, Plan(TWO, Mixer())))
    known, held_out = [example("ask me", "yes")], [example("what is", "no"), example("a", "b")]
    fixed = with_fixed_weights(serving, base, known, held_out)
    before = score(base, serving, held_out, Scoring(generate=False)).metrics["loss"]
    after = score(base, fixed.serving, held_out, Scoring(generate=False)).metrics["loss"]
    assert fixed.losses == (before, after)
    assert f"{after:.3f} nats a token instead of {before:.3f}" in fixed.note
    # Over all sites the mean weight of the first slot is what the tokens' weights are on average.
    own = []
    for site in base.adapted.sites:
        b = fixed.serving.tree[Name(site, "all", "B")][:, :2]
        part = serving.tree[Name(site, "individual", "B")] * TWO[0].scaling
        own.append(float((b / part).mean()))
        torch.testing.assert_close(b, part * own[-1])
    weights = weights_of(base, serving, known[0].ids[:-1])
    assert sum(own) / len(own) == pytest.approx(float(weights[:, 0].mean()), rel=1e-4)
    # A client that trains with all it has is told what the same weights cost there.
    assert "on the client's validation examples" in fixed.note
    alone = with_fixed_weights(serving, base, known, ())
    assert "on the client's training examples, as it has none for validation" in alone.note
    loss = score(base, serving, known, Scoring(generate=False)).metrics["loss"]
    assert alone.losses is not None
    assert alone.losses[0] == loss
    assert trees.equal(alone.serving.tree, fixed.serving.tree)


def test_what_cannot_be_fixed_is_said():
    base = base_of()
    tree = random_serving_tree(base, Plan(TWO, Sum((1.0, 1.0))))
    weighed = Serving(Plan(TWO, Similarity(0.5, 0, 1)), tree)
    with pytest.raises(ValueError, match="anew for every prompt"):
        with_fixed_weights(weighed, base, (), ())
    mixer = Serving(Plan(TWO, Mixer()), random_serving_tree(base, Plan(TWO, Mixer())))
    with pytest.raises(ValueError, match="but it has none; --format fedalt"):
        with_fixed_weights(mixer, base, (), ())


def test_all_clients_are_written_as_plain_adapters_whose_cost_is_told(
    finished_run, tiny_model_dir, tmp_path, capsys
):
    out = tmp_path / "loras"
    assert call("export", finished_run, "--all", "--format", "peft", "--out", out) == 0
    told = capsys.readouterr()
    assert told.out.split() == [str(out / client) for client in "abc"]
    assert len(re.findall(r"note: [abc]: .* nats a token instead of", told.err)) == 3
    of = served(finished_run, "b")
    task = reopen(finished_run, of.parts.base).task
    known, held_out = (task.examples("b", split) for split in ("train", "validation"))
    fixed = with_fixed_weights(of.serving, of.parts.base, known, held_out)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    lora = PeftModel.from_pretrained(plain, str(out / "b")).eval()
    with of.parts.base.adapted.bound(fixed.serving.plan, fixed.serving.tree) as model:
        torch.testing.assert_close(logits_of(lora), logits_of(model))
    readme = (out / "b" / "README.md").read_text()
    assert fixed.note[1:] in readme
    parts = replace(of.parts, base=replace(of.parts.base, quantise="4bit"))
    assert "trained on this base in 4bit" in card(replace(of, parts=parts), "b", "peft")
    assert "4bit" not in readme
    assert "--max-lora-rank 8 " in readme  # two of rank 2, and the least that vLLM knows
    assert call("export", finished_run, "--all", "--client", "a", "--out", tmp_path / "x") == 2
    asked = ("export", finished_run, "--client", "b", "--format", "peft", "--out", out / "b")
    capsys.readouterr()
    assert call(*asked) == 2  # and nothing was measured before
    assert re.fullmatch(r"error: .* exists already and is not empty\n", capsys.readouterr().err)
    merged = tmp_path / "merged"
    flags = ("--client", "b", "--format", "merged", "--out", merged)
    assert call("export", finished_run, *flags) == 0
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(merged).eval()), logits_of(lora)
    )
    assert len(AutoTokenizer.from_pretrained(merged)) == 64
