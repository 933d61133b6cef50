"""Exported folders, loaded by PEFT and transformers, against the layer bound to the same tree."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import fedalt
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import HEAD, MIXER, Mixer, Plan, Slot, Sum, single
from fedalt.evaluation import Scoring, generate
from fedalt.export import loading
from fedalt.export.folders import export_individual, export_personal
from fedalt.export.peft_type import FedALTConfig, FedALTLayer, Kind, key_of, register
from fedalt.methods.contract import Serving
from fedalt.models import Base, load_base
from fedalt.tree import Name, select

TWO = (Slot("individual", 2, 4.0), Slot("rest_of_world", 3, 1.5))
MIXED = Plan(TWO, Mixer(), dropout=0.3)
PLANS = {
    "mixer": MIXED,
    "fixed sum": Plan(TWO, Sum((0.25, 2.0))),
    "single": single(Slot("shared", 4, 8.0)),
}
LABELS = ("no", "maybe", "yes")
IDS = tiny.tokens(3, 7)

each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
each_kind = pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "bloom", "bert_classifier", "roberta_classifier", "llama_classifier"]
)
GetBase = Callable[..., Base]


@pytest.fixture(scope="module")
def get_base(tmp_path_factory: pytest.TempPathFactory) -> GetBase:
    """Bases of tiny models that lie on disk with a tokenizer; each is loaded once."""
    known: dict[tuple[Any, ...], Base] = {}

    def get(kind: str, targets: str | None = None) -> Base:
        if (kind, targets) not in known:
            folder = tmp_path_factory.mktemp(kind)
            tiny.ALL[kind]().save_pretrained(folder)
            words = {f"w{index}": index for index in range(tiny.VOCAB)}
            splitter = Tokenizer(models.WordLevel(words, unk_token="w3"))
            splitter.pre_tokenizer = pre_tokenizers.Whitespace()
            PreTrainedTokenizerFast(
                tokenizer_object=splitter, pad_token="w0", bos_token="w1", eos_token="w2"
            ).save_pretrained(folder)
            labels = LABELS if kind in tiny.CLASSIFIERS else ()
            known[kind, targets] = load_base(str(folder), labels=labels, targets=targets)
        return known[kind, targets]

    return get


def serving_for(base: Base, plan: Plan = MIXED, seed: int = 0) -> Serving:
    return Serving(plan, tiny.random_tree(base.adapted, plan, seed=seed))


def plain(base: Base, **options: Any) -> Any:
    """The base model as anybody loads it."""
    if base.adapted.heads:
        return AutoModelForSequenceClassification.from_pretrained(
            base.name, num_labels=len(LABELS), **options
        )
    return AutoModelForCausalLM.from_pretrained(base.name, **options)


@torch.no_grad()
def bound_logits(base: Base, serving: Serving) -> Tensor:
    with base.adapted.bound(serving.plan, serving.tree) as model:
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits
    return logits


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@each_plan
@each_kind
def test_the_loaded_model_equals_the_bound_layer(
    kind: str, plan: Plan, get_base: GetBase, tmp_path: Path
) -> None:
    base = get_base(kind)
    serving = serving_for(base, plan)
    model = fedalt.load(export_personal(serving, base, tmp_path / "out"), device="cpu")
    assert_close(logits_of(model), bound_logits(base, serving))
    assert (logits_of(model) - logits_of(plain(base))).abs().max() > 0.05
    assert not model.training


@pytest.mark.parametrize("targets", ["all-linear", "v_proj", "layers.1.mlp.up_proj"])
def test_other_sites_than_the_default_are_found_again(
    targets: str, get_base: GetBase, tmp_path: Path
) -> None:
    base = get_base("llama", targets)
    serving = serving_for(base)
    wanted = bound_logits(base, serving)
    assert_close(logits_of(fedalt.load(export_personal(serving, base, tmp_path / "a"))), wanted)
    folder = export_individual(serving, base, tmp_path / "b")
    alone = Serving(single(TWO[0]), select(serving.tree, "individual", HEAD))
    model = PeftModel.from_pretrained(plain(base), str(folder))
    assert_close(logits_of(model), bound_logits(base, alone))


@each_kind
@pytest.mark.parametrize("slot", TWO, ids=["individual", "rest_of_world"])
def test_a_slot_loads_as_plain_lora_and_equals_the_layer_with_that_slot_alone(
    kind: str, slot: Slot, get_base: GetBase, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = get_base(kind)
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


def test_the_first_slot_is_exported_unless_another_is_named(
    get_base: GetBase, tmp_path: Path
) -> None:
    base = get_base("llama")
    export_individual(serving_for(base), base, tmp_path / "a")
    export_individual(serving_for(base, PLANS["single"]), base, tmp_path / "b")
    configs = [json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab"]
    assert [(config["r"], config["lora_alpha"]) for config in configs] == [(2, 4), (4, 8)]
    assert configs[0]["target_modules"] == ["q_proj", "v_proj"]
    assert Path(configs[0]["base_model_name_or_path"]).samefile(base.name)
    with pytest.raises(ValueError, match="no slot 'shared' to export, only individual, rest_of_w"):
        export_individual(serving_for(base), base, tmp_path / "c", slot="shared")


def test_importing_fedalt_is_all_that_peft_needs(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
    serving = serving_for(base)
    folder = export_personal(serving, base, tmp_path / "out")
    script = f"""
import fedalt
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


def test_the_command_itself_does_not_import_peft() -> None:
    script = "import sys; sys.argv = ['/bin/fedalt']; import fedalt; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout.split() == [b"False"]


def test_peft_finds_the_type_by_its_text_and_can_be_told_twice() -> None:
    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["FEDALT"] is FedALTConfig
    assert Kind.FEDALT == "FEDALT"
    assert Kind.FEDALT not in list(peft.PeftType)


def test_generation_equals_that_of_the_bound_layer(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
    serving = serving_for(base)
    folder = export_personal(serving, base, tmp_path / "out")
    model, tokenizer = fedalt.load(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ["w9 w4 w30 w8", "w7 w11"]
    wanted = generate(
        base, serving, [tokenizer(prompt)["input_ids"] for prompt in prompts], Scoring(beams=2)
    )
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    written = model.generate(**inputs, max_new_tokens=80, num_beams=2, do_sample=False)
    new = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], True)
    assert [text.strip() for text in new] == wanted
    assert len(wanted[0].split()) > 3
    assert wanted[0] != wanted[1]


def test_transformers_alone_loads_the_folder(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
    serving = serving_for(base)
    folder = export_personal(serving, base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_close(logits_of(model), bound_logits(base, serving))


@pytest.mark.parametrize("kind", ["llama", "bert_classifier"])
def test_what_peft_saves_again_is_the_same(kind: str, get_base: GetBase, tmp_path: Path) -> None:
    base = get_base(kind)
    serving = serving_for(base)
    first = export_personal(serving, base, tmp_path / "first")
    second = tmp_path / "second"
    fedalt.load(first).save_pretrained(second)
    names = "adapter_model.safetensors"
    before, after = load_file(first / names), load_file(second / names)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert_close(logits_of(fedalt.load(second)), bound_logits(base, serving))


def test_an_untrained_adapter_of_peft_changes_nothing(get_base: GetBase) -> None:
    base = get_base("llama")
    slots = [{"name": "individual", "rank": 2, "alpha": 4.0}]
    model = get_peft_model(plain(base), FedALTConfig(task_type="CAUSAL_LM", slots=slots))
    assert_close(logits_of(model), logits_of(plain(base)))
    sites = {name for name, module in model.named_modules() if isinstance(module, FedALTLayer)}
    assert {site.removeprefix("base_model.model.") for site in sites} == set(base.adapted.sites)


def test_a_disabled_adapter_leaves_the_base_model(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("gpt2")
    serving = serving_for(base)
    model = fedalt.load(export_personal(serving, base, tmp_path / "out"))
    with model.disable_adapter():
        assert_close(logits_of(model), logits_of(plain(base)))
    assert_close(logits_of(model), bound_logits(base, serving))


def test_several_clients_share_one_base_model(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
    # named like a slot on purpose: names of adapters and of slots must not get mixed up
    servings = {
        "default": serving_for(base, seed=1),
        "individual": serving_for(base, seed=2),
        "third": serving_for(base, PLANS["single"], seed=3),
    }
    for name, serving in servings.items():
        export_personal(serving, base, tmp_path / name)
    model = fedalt.load(tmp_path / "default")
    for name in ("individual", "third"):
        model.load_adapter(str(tmp_path / name), name)
    for name, serving in servings.items():
        model.set_adapter(name)
        assert_close(logits_of(model), bound_logits(base, serving))
    model.save_pretrained(tmp_path / "again", selected_adapters=["default", "individual"])
    for name, folder in (("default", "again"), ("individual", "again/individual")):
        again = fedalt.load(tmp_path / folder)
        assert_close(logits_of(again), bound_logits(base, servings[name]))
    model.delete_adapter("third")
    model.set_adapter("individual")
    assert_close(logits_of(model), bound_logits(base, servings["individual"]))


def test_merging_is_refused_and_leaves_the_model_as_it_was(
    get_base: GetBase, tmp_path: Path
) -> None:
    base = get_base("llama")
    serving = serving_for(base)
    model = fedalt.load(export_personal(serving, base, tmp_path / "out"))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="mixer weighs the slots anew for every token"):
            merge()
    assert_close(logits_of(model), bound_logits(base, serving))
    assert_close(logits_of(model.unload()), logits_of(plain(base)))


def test_gradients_equal_those_of_the_bound_tree(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
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


def test_dropout_acts_only_while_training(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
    model = fedalt.load(export_personal(serving_for(base), base, tmp_path / "out"))
    quiet = logits_of(model)
    assert torch.equal(logits_of(model), quiet)
    model.train()
    assert (logits_of(model) - quiet).abs().max() > 0.01


def test_adapters_stay_float32_over_a_bfloat16_base(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
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


def test_a_classifier_comes_back_with_its_labels_and_padding(
    get_base: GetBase, tmp_path: Path
) -> None:
    base = get_base("llama_classifier")
    config = fedalt.load(export_personal(serving_for(base), base, tmp_path / "out")).config
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert config.pad_token_id == base.adapted.model.config.pad_token_id


def test_the_built_in_base_is_referred_to_by_name(
    get_base: GetBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = get_base("llama")
    serving = serving_for(base)
    folder = export_personal(serving, replace(base, name="tiny"), tmp_path / "out")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "fedalt:tiny"
    monkeypatch.setattr(loading, "location", {"tiny": base.name}.__getitem__)
    assert_close(logits_of(fedalt.load(folder)), bound_logits(base, serving))


def test_a_folder_appears_whole_or_not_at_all(
    get_base: GetBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = get_base("llama")
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


def test_a_serving_of_another_base_is_not_exported(get_base: GetBase, tmp_path: Path) -> None:
    serving = serving_for(get_base("gpt2"))
    for export in (export_individual, export_personal):
        with pytest.raises(ValueError, match="the serving to export lacks"):
            export(serving, get_base("llama"), tmp_path / "out")
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
    damage: Callable[[Path], object], problem: str, get_base: GetBase, tmp_path: Path
) -> None:
    base = get_base("llama")
    folder = export_personal(serving_for(base), base, tmp_path / "out")
    damage(folder)
    with pytest.raises(ValueError, match=problem) as caught:
        fedalt.load(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*gone' to load"):
        fedalt.load(tmp_path / "gone")


def test_only_linear_layers_are_adapted(get_base: GetBase) -> None:
    config = FedALTConfig(
        slots=[{"name": "a", "rank": 1, "alpha": 1.0}], target_modules=["embed_tokens"]
    )
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding, but only linear"):
        get_peft_model(plain(get_base("llama")), config)


def test_keys_read_like_names(get_base: GetBase, tmp_path: Path) -> None:
    base = get_base("llama")
    folder = export_personal(serving_for(base), base, tmp_path / "out")
    keys = load_file(folder / "adapter_model.safetensors").keys()
    start = "base_model.model.model.layers.0.self_attn.q_proj.fedalt_slots"
    assert f"{start}.rest_of_world_B" in keys
    assert f"{start}.{key_of(Name('', MIXER, 'G'))}" in keys
    assert isinstance(PeftConfig.from_pretrained(str(folder)), FedALTConfig)


def test_the_example_writes_an_answer(
    get_base: GetBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = get_base("llama")
    folder = export_personal(serving_for(base), base, tmp_path / "out")
    script = Path(__file__).parents[1] / "examples" / "use_in_transformers.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), "--prompt", "w9 w4", "--tokens=5"])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith("w")
