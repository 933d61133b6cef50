"""FedALT as a PEFT type: what PEFT and transformers do with it on their own."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny
import torch
from exported import (
    IDS,
    MIXED,
    PLANS,
    assert_close,
    base_of,
    bound_logits,
    load,
    logits_of,
    plain,
    serving_for,
)
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedalt.peft  # noqa: F401 - transformers alone loads folders then
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import MIXER
from fedalt.core.tree import Name
from fedalt.export.folders import export_personal
from fedalt.export.peft_type import FedALTConfig, FedALTLayer, Kind, key_of, register


def test_importing_fedalt_peft_is_all_that_peft_needs(tmp_path: Path) -> None:
    base = base_of("llama")
    serving = serving_for(base)
    folder = export_personal(serving, base, tmp_path / "out")
    script = f"""
import fedalt.peft
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({base.name!r})
model = PeftModel.from_pretrained(model, {str(folder)!r})
with torch.no_grad():
    logits = model(input_ids=torch.tensor({IDS.tolist()})).logits
save_file({{"logits": logits}}, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert_close(load_file(tmp_path / "logits")["logits"], bound_logits(base, serving))


def test_peft_finds_the_type_by_its_text_and_can_be_told_twice() -> None:
    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["FEDALT"] is FedALTConfig
    assert Kind.FEDALT == "FEDALT"
    assert Kind.FEDALT not in list(peft.PeftType)


def test_transformers_alone_loads_the_folder(tmp_path: Path) -> None:
    base = base_of("llama")
    serving = serving_for(base)
    folder = export_personal(serving, base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_close(logits_of(model), bound_logits(base, serving))


@pytest.mark.parametrize("kind", ["llama", "bert_classifier"])
def test_what_peft_saves_again_is_the_same(kind: str, tmp_path: Path) -> None:
    base = base_of(kind)
    serving = serving_for(base)
    first = export_personal(serving, base, tmp_path / "first")
    second = tmp_path / "second"
    load(first).save_pretrained(second)
    names = "adapter_model.safetensors"
    before, after = load_file(first / names), load_file(second / names)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert_close(logits_of(load(second)), bound_logits(base, serving))


def test_an_untrained_adapter_of_peft_changes_nothing() -> None:
    base = base_of("llama")
    slots = [{"name": "individual", "rank": 2, "alpha": 4.0}]
    model = get_peft_model(plain(base), FedALTConfig(task_type="CAUSAL_LM", slots=slots))
    assert_close(logits_of(model), logits_of(plain(base)))
    sites = {name for name, module in model.named_modules() if isinstance(module, FedALTLayer)}
    assert {site.removeprefix("base_model.model.") for site in sites} == set(base.adapted.sites)


def test_a_disabled_adapter_leaves_the_base_model(tmp_path: Path) -> None:
    base = base_of("gpt2")
    serving = serving_for(base)
    model = load(export_personal(serving, base, tmp_path / "out"))
    with model.disable_adapter():
        assert_close(logits_of(model), logits_of(plain(base)))
    assert_close(logits_of(model), bound_logits(base, serving))


def test_several_clients_share_one_base_model(tmp_path: Path) -> None:
    base = base_of("llama")
    # named like a slot on purpose: names of adapters and of slots must not get mixed up
    servings = {
        "default": serving_for(base, seed=1),
        "individual": serving_for(base, seed=2),
        "third": serving_for(base, PLANS["single"], seed=3),
    }
    for name, serving in servings.items():
        export_personal(serving, base, tmp_path / name)
    model = load(tmp_path / "default")
    for name in ("individual", "third"):
        model.load_adapter(str(tmp_path / name), name)
    for name, serving in servings.items():
        model.set_adapter(name)
        assert_close(logits_of(model), bound_logits(base, serving))
    model.save_pretrained(tmp_path / "again", selected_adapters=["default", "individual"])
    for name, folder in (("default", "again"), ("individual", "again/individual")):
        again = load(tmp_path / folder)
        assert_close(logits_of(again), bound_logits(base, servings[name]))
    model.delete_adapter("third")
    model.set_adapter("individual")
    assert_close(logits_of(model), bound_logits(base, servings["individual"]))


def test_merging_is_refused_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = base_of("llama")
    serving = serving_for(base)
    model = load(export_personal(serving, base, tmp_path / "out"))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="mixer weighs the slots anew for every token"):
            merge()
    assert_close(logits_of(model), bound_logits(base, serving))
    assert_close(logits_of(model.unload()), logits_of(plain(base)))


def test_gradients_equal_those_of_the_bound_tree(tmp_path: Path) -> None:
    base = base_of("llama")
    serving = serving_for(base, replace(MIXED, dropout=0.0))
    folder = export_personal(serving, base, tmp_path / "out")
    model = PeftModel.from_pretrained(plain(base), str(folder), is_trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    tree = tiny.trained(serving.tree)
    with base.adapted.bound(serving.plan, tree) as bound:
        wanted = tiny.gradients(bound(input_ids=IDS, labels=IDS).loss, tree)
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, FedALTLayer)
    }
    for name, gradient in wanted.items():
        layer = layers[f"base_model.model.{name.site}"]
        assert_close(layer.fedalt_slots["default"][key_of(name)].grad, gradient)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(tree)


def test_dropout_acts_only_while_training(tmp_path: Path) -> None:
    base = base_of("llama")
    model = load(export_personal(serving_for(base), base, tmp_path / "out"))
    quiet = logits_of(model)
    assert torch.equal(logits_of(model), quiet)
    model.train()
    assert (logits_of(model) - quiet).abs().max() > 0.01


def test_adapters_stay_float32_over_a_bfloat16_base(tmp_path: Path) -> None:
    base = base_of("llama")
    serving = serving_for(base)
    folder = export_personal(serving, base, tmp_path / "out")
    model = PeftModel.from_pretrained(plain(base, dtype=torch.bfloat16), str(folder))
    adapted = AdaptedModel(plain(base, dtype=torch.bfloat16))
    with adapted.bound(serving.plan, serving.tree) as bound:
        wanted = logits_of(bound)
    assert wanted.dtype == torch.bfloat16
    assert torch.equal(logits_of(model), wanted)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32


def test_only_linear_layers_are_adapted() -> None:
    config = FedALTConfig(
        slots=[{"name": "a", "rank": 1, "alpha": 1.0}], target_modules=["embed_tokens"]
    )
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding, but only linear"):
        get_peft_model(plain(base_of("llama")), config)


def test_keys_read_like_names(tmp_path: Path) -> None:
    base = base_of("llama")
    folder = export_personal(serving_for(base), base, tmp_path / "out")
    keys = load_file(folder / "adapter_model.safetensors").keys()
    start = "base_model.model.model.layers.0.self_attn.q_proj.fedalt_slots"
    assert f"{start}.rest_of_world_B" in keys
    assert f"{start}.{key_of(Name('', MIXER, 'G'))}" in keys
    assert isinstance(PeftConfig.from_pretrained(str(folder)), FedALTConfig)
