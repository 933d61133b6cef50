"""Exported folders, loaded again, against the layer bound to the same tree."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    IDS,
    LABELS,
    PLANS,
    TWO,
    assert_close,
    base_of,
    bound_logits,
    load,
    logits_of,
    plain,
    serving_for,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Plan, Slot, Sum, single
from fedalt.core.tree import select
from fedalt.evaluation import Scoring, generate
from fedalt.export import loading
from fedalt.export.folders import export_individual, export_personal
from fedalt.methods.contract import Serving
from fedalt.methods.fedalt import FedALT, Server
from fedalt.models.base import load_base

each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
each_kind = pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "bloom", "bert_classifier", "roberta_classifier", "llama_classifier"]
)


@each_plan
@each_kind
def test_the_loaded_model_equals_the_bound_layer(kind: str, plan: Plan, tmp_path: Path) -> None:
    base = base_of(kind)
    serving = serving_for(base, plan)
    model = load(export_personal(serving, base, tmp_path / "out"))
    assert_close(logits_of(model), bound_logits(base, serving))
    assert (logits_of(model) - logits_of(plain(base))).abs().max() > 0.05
    assert not model.training


@pytest.mark.parametrize("targets", ["all-linear", "v_proj", "layers.1.mlp.up_proj"])
def test_other_sites_than_the_default_are_found_again(targets: str, tmp_path: Path) -> None:
    base = base_of("llama", targets)
    serving = serving_for(base)
    wanted = bound_logits(base, serving)
    assert_close(logits_of(load(export_personal(serving, base, tmp_path / "a"))), wanted)
    folder = export_individual(serving, base, tmp_path / "b")
    alone = Serving(single(TWO[0]), select(serving.tree, "individual", HEAD))
    model = PeftModel.from_pretrained(plain(base), str(folder))
    assert_close(logits_of(model), bound_logits(base, alone))


@each_kind
@pytest.mark.parametrize("slot", TWO, ids=["individual", "rest_of_world"])
def test_a_slot_loads_as_plain_lora_and_equals_the_layer_with_that_slot_alone(
    kind: str, slot: Slot, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = base_of(kind)
    serving = serving_for(base)
    folder = export_individual(serving, base, tmp_path / "out", slot=slot.name)
    model = PeftModel.from_pretrained(plain(base), str(folder))
    alone = Serving(single(slot), select(serving.tree, slot.name, HEAD))
    assert_close(logits_of(model), bound_logits(base, alone))
    assert model.peft_config["default"].peft_type == "LORA"
    if not base.adapted.heads:  # a mixer fixed to the slot, in the sense of the layer itself
        fixed = Plan(TWO, Sum((float(slot == TWO[0]), float(slot == TWO[1]))))
        without_mixer = select(serving.tree, *(slot.name for slot in TWO))
        assert_close(logits_of(model), bound_logits(base, Serving(fixed, without_mixer)))
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_the_individual_slot_or_a_routers_own_is_exported_unless_another_is_named(
    tmp_path: Path,
) -> None:
    base = base_of("llama")
    export_individual(serving_for(base), base, tmp_path / "a")
    export_individual(serving_for(base, PLANS["single"]), base, tmp_path / "b")
    configs = [json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab"]
    assert [(config["r"], config["lora_alpha"]) for config in configs] == [(2, 4), (4, 8)]
    export_individual(serving_for(base, PLANS["router"]), base, tmp_path / "routed")
    routed = json.loads((tmp_path / "routed" / "adapter_config.json").read_text())
    assert (routed["r"], routed["lora_alpha"]) == (3, 1.5)  # its own, not its first
    assert configs[0]["target_modules"] == ["q_proj", "v_proj"]
    assert Path(configs[0]["base_model_name_or_path"]).samefile(base.name)
    with pytest.raises(ValueError, match="no slot 'shared' to export, only individual, rest_of_w"):
        export_individual(serving_for(base), base, tmp_path / "c", slot="shared")


def test_the_individual_slot_is_found_behind_others_and_missing_is_an_error(tmp_path: Path) -> None:
    base = base_of("llama")
    shared = Slot("shared", 4, 8.0)
    behind = serving_for(base, Plan((shared, TWO[0]), Sum((1.0, 1.0))))  # as PF2LoRA's
    export_individual(behind, base, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    several = serving_for(base, Plan((shared, TWO[1]), Sum((1.0, 1.0))))
    with pytest.raises(ValueError, match="no individual adapter: its adapters are shared, rest_of"):
        export_individual(several, base, tmp_path / "b")


def test_generation_equals_that_of_the_bound_layer(tmp_path: Path) -> None:
    base = base_of("llama")
    serving = serving_for(base)
    folder = export_personal(serving, base, tmp_path / "out")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ["w9 w4 w30 w8", "w7 w11"]
    wanted = generate(
        base,
        serving,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        Scoring(beams=2, max_new_tokens=30),  # the model numbers 64 positions
    )
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    written = model.generate(**inputs, max_new_tokens=30, num_beams=2, do_sample=False)
    new = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], True)
    assert [text.strip() for text in new] == wanted
    assert len(wanted[0].split()) > 3
    assert wanted[0] != wanted[1]


def test_a_causal_base_comes_back_as_a_classifier_with_labels_and_padding(tmp_path: Path) -> None:
    base = load_base(base_of("gpt2").name, labels=LABELS, device="cpu")
    serving = serving_for(base)
    model = load(export_personal(serving, base, tmp_path / "out"))
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    padded = IDS.clone()
    padded[0, 4:] = base.adapted.model.config.pad_token_id
    assert_close(logits_of(model, padded), bound_logits(base, serving, padded))
    assert not torch.allclose(logits_of(model, padded)[0], logits_of(model)[0])


def test_a_client_without_others_is_exported_too(tmp_path: Path) -> None:
    base, method = base_of("llama"), FedALT()
    init = Initializer(base.adapted.sites, base.adapted.heads, seed=0)
    deploying = method.deploy(method.init_client(init, "a"), method.broadcast(Server(), "a"))
    with pytest.raises(StopIteration) as stop:
        next(deploying)
    serving: Serving = stop.value.value  # both slots hold the same A
    model = load(export_personal(serving, base, tmp_path / "out"))
    assert_close(logits_of(model), logits_of(plain(base)))


def test_the_built_in_base_is_referred_to_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("llama")
    serving = serving_for(base)
    folder = export_personal(serving, replace(base, name="tiny"), tmp_path / "out")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "fedalt:tiny"
    monkeypatch.setattr(loading, "location", {"tiny": base.name}.__getitem__)
    assert_close(logits_of(load(folder)), bound_logits(base, serving))


def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("llama")
    serving = serving_for(base)

    def full_disk(folder: Path) -> None:
        assert {"adapter_config.json", "adapter_model.safetensors"} == {
            path.name for path in folder.iterdir()
        }
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(base.tokenizer, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_personal(serving, base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    export_personal(serving, base, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already and is not empty"):
        export_individual(serving, base, tmp_path / "out")


def test_a_serving_of_another_base_is_not_exported(tmp_path: Path) -> None:
    serving = serving_for(base_of("gpt2"))
    for export in (export_individual, export_personal):
        with pytest.raises(ValueError, match="the serving to export lacks"):
            export(serving, base_of("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def shrink(tensors: dict[str, Tensor]) -> None:
    first = min(tensors)
    tensors[first] = tensors[first][:1].clone()


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "config.json cannot be re"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "config.json cannot be re"),
    "plain LoRA": (lambda f: edit(f, peft_type="LORA"), "of PEFT's type 'LORA', but only 'FEDALT'"),
    "no slots": (lambda f: edit(f, slots=[]), "config.json cannot be read: a plan has at least"),
    "odd router": (lambda f: edit(f, router={"own": 0}), "config.json cannot be read"),
    "odd slot": (lambda f: edit(f, slots=[{"name": "a"}]), "a slot has name, rank and alpha"),
    "no base": (lambda f: edit(f, base_model_name_or_path="/gone"), "cannot load '/gone', the ba"),
    "null base": (lambda f: edit(f, base_model_name_or_path=None), "cannot load None, the base"),
    "hub base": (lambda f: edit(f, base_model_name_or_path="a/b"), "cannot load 'a/b', the base"),
    "other sites": (lambda f: edit(f, target_modules=["nothing"]), "does not fit its base model"),
    "fewer sites": (lambda f: edit(f, target_modules=["q_proj"]), "on one side only, first base"),
    "truncated": (truncate, "safetensors cannot be read"),
    "other shape": (lambda f: edit_tensors(f, shrink), "does not fit its base model"),
    "one gone": (lambda f: edit_tensors(f, lambda t: t.pop(min(t))), "1 tensors are on one side"),
}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_what_cannot_be_loaded_is_one_clear_error(
    damage: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    base = base_of("llama")
    folder = export_personal(serving_for(base), base, tmp_path / "out")
    damage(folder)
    with pytest.raises(ValueError, match=problem) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*gone' to load"):
        load(tmp_path / "gone")


def test_the_example_writes_an_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = base_of("llama")
    folder = export_personal(serving_for(base), base, tmp_path / "out")
    script = Path(__file__).parents[1] / "examples" / "use_in_transformers.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), "--prompt", "w9 w4", "--tokens=5"])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith("w")
