"""A base model is the one in its folder, whole, or it is refused in one sentence that names why."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import letters
from models_on_disk import SIZES, edit_json, edit_weights, saved
from runs_for_tests import save_model, settings_for, write_clients
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from fedalt.models.base import ModelError, load_base, load_tokenizer, require_tokenizer_fits
from fedalt.runs.setup import prepare


def prefixed(prefix: str) -> Callable[[Path], object]:
    return lambda folder: edit_weights(
        folder, lambda tensors: {prefix + name: each for name, each in tensors.items()}
    )


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: edit_weights(
        folder, lambda tensors: {key: each for key, each in tensors.items() if key != name}
    )


def into_shards(folder: Path) -> None:
    """An index that names a file which was not downloaded."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "compiled": (prefixed("_orig_mod."), r"lacks 21 tensors, first lm_head.* first _orig_mod\."),
    "parallel": (prefixed("module."), r"lacks 21 tensors, first lm_head.* first module\."),
    "one missing": (without(UP), f"lacks 1 tensor, first {UP}"),
    "another shape": (
        lambda f: edit_weights(f, lambda t: {**t, UP: t[UP][:-8].clone()}),
        rf"1 tensor of another shape, first {UP} with \[40, 32\], expected \[48, 32\]",
    ),
    "fewer layers asked for": (
        lambda f: edit_json(f, "config.json", num_hidden_layers=1),
        r"9 tensors without a place in the model, first model\.layers\.1\.",
    ),
    "more layers asked for": (
        lambda f: edit_json(f, "config.json", num_hidden_layers=3),
        r"lacks 9 tensors, first model\.layers\.2\.",
    ),
    "truncated": (truncate, "cannot load the model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot load the model"),
    "missing shard": (into_shards, "cannot load the model"),
    "odd number": (
        lambda f: edit_json(f, "config.json", hidden_size="many"),
        "cannot load the model",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "cannot load the model"),
    "unknown type": (lambda f: edit_json(f, "config.json", model_type="nonesuch"), "nonesuch"),
    "not finite": (
        lambda f: edit_weights(f, lambda t: {**t, UP: t[UP] * float("nan")}),
        f"computes no numbers: its tensor {UP} holds values that are not finite",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(
    damage: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=problem) as caught:
        load_base(str(folder), device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_beside_the_network_does_no_harm(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    expected = load_base(str(folder), device="cpu").fingerprint
    edit_weights(folder, lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, 32)})
    assert load_base(str(folder), device="cpu").fingerprint == expected


def test_what_is_no_model_folder_is_told_what_it_is(tmp_path: Path) -> None:
    gguf, weights = tmp_path / "m.gguf", tmp_path / "w.safetensors"
    gguf.write_bytes(b"GGUF")
    save_file({"a": torch.ones(1)}, weights)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    about = {"base_model_name_or_path": "owner/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    above = tmp_path / "above"
    (above / "checkpoint-5").mkdir(parents=True)
    (above / "checkpoint-5" / "config.json").write_text("{}")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.gguf").write_bytes(b"GGUF")
    for place, problem in (
        (gguf, "cannot be made a base model"),
        (weights, "is a single file of weights"),
        (adapter, "holds an adapter of the base model 'owner/base'"),
        (above, "its folders checkpoint-5 have one"),
        (alone, "has no config.json, but a GGUF file: give that file itself"),
    ):
        with pytest.raises(ModelError, match=problem):
            load_base(str(place), device="cpu")
    both = save_model(tmp_path / "both")
    shutil.copy(adapter / "adapter_config.json", both)
    with pytest.raises(ModelError, match="holds an adapter of the base model 'owner/base'"):
        load_base(str(both), device="cpu")


def test_code_that_comes_with_a_model_is_not_asked_for_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    code = 'print("CODE RAN")\nfrom transformers import LlamaConfig\nclass C(LlamaConfig): pass\n'
    folder = save_model(tmp_path / "model")
    (folder / "configuration_own.py").write_text(code)
    own = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit_json(folder, "config.json", model_type="own", auto_map=own)
    with pytest.raises(ModelError, match=r"code of its own \(configuration_own\.C, modeling_own"):
        load_base(str(folder), device="cpu")
    folder = save_model(tmp_path / "tokenizer")
    (folder / "tokenization_own.py").write_text(code)
    own_tokenizer = {"AutoTokenizer": ["tokenization_own.T", None]}
    edit_json(folder, "tokenizer_config.json", tokenizer_class="T", auto_map=own_tokenizer)
    with pytest.raises(ModelError, match=r"tokenization_own\.T in auto_map of tokenizer_config"):
        load_tokenizer(str(folder))
    assert sys.stdin.read() == "y\n" * 9
    assert "CODE RAN" not in capsys.readouterr().out


def test_a_type_that_transformers_knows_needs_no_code(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    expected = load_base(str(folder), device="cpu").fingerprint
    edit_json(folder, "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.L"})
    assert load_base(str(folder), device="cpu").fingerprint == expected


def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path) -> None:
    roberta = saved(tmp_path / "roberta", RobertaForMaskedLM, RobertaConfig(**SIZES))
    bert = saved(tmp_path / "bert", BertForMaskedLM, BertConfig(**SIZES))
    for folder in (roberta, bert):
        with pytest.raises(ModelError, match="sees the tokens that follow"):
            load_base(str(folder), device="cpu")
    decoder = BertConfig(**SIZES, is_decoder=True)
    load_base(str(saved(tmp_path / "decoder", BertLMHeadModel, decoder)), device="cpu")


def test_an_encoder_decoder_writes_no_text_here(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1}
    config = T5Config(**sizes, num_heads=4)
    folder = saved(tmp_path / "t5", T5ForConditionalGeneration, config)
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\)"):
        load_base(str(folder), device="cpu")


def test_a_classifier_that_looks_for_the_end_of_a_text_needs_a_tokenizer_that_writes_it(
    tmp_path: Path,
) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1}
    config = T5Config(**sizes, num_heads=4, num_labels=2, eos_token_id=2, decoder_start_token_id=0)
    folder = saved(tmp_path / "t5", T5ForSequenceClassification, config)
    with pytest.raises(ModelError, match=r"does not read.*<eos>.*expected the tokenizer"):
        load_base(str(folder), labels=("a", "b"), device="cpu")
    tokenizer = letters()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    load_base(str(folder), labels=("a", "b"), device="cpu")


def test_a_tokenizer_larger_than_the_embedding_is_told_with_both_sizes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    problem = r"has 65 tokens, but the model an embedding for 64: '<\|turn\|>' \(64\)"
    with pytest.raises(ModelError, match=problem):
        load_base(str(folder), device="cpu")
    with pytest.raises(ModelError, match=problem):
        require_tokenizer_fits(load_tokenizer(str(folder)), str(folder))


def test_a_token_without_an_embedding_does_no_harm_until_a_text_has_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(folder)
    data = write_clients(tmp_path / "data", clients=("a", "b"), count=2)
    prepare(settings_for(folder, data))
    file = data / "b.test.jsonl"
    file.write_text(file.read_text().replace("ask 100b", "ask <|turn|>"))
    problem = r"client 'b', test: the token '<\|turn\|>' \(64\) is in the text, but .* 65 .* for 64"
    with pytest.raises(ModelError, match=problem):
        prepare(settings_for(folder, data))


def test_positions_begin_behind_the_padding(tmp_path: Path) -> None:
    """RoBERTa numbers its tokens from pad_token_id + 1 on: of 64 rows 63 are left, minus one."""
    config = RobertaConfig(**{**SIZES, "pad_token_id": 1, "num_labels": 2})
    folder = saved(tmp_path / "roberta", RobertaForSequenceClassification, config)
    base = load_base(str(folder), labels=("a", "b"), device="cpu")
    assert base.positions == 62
    base.adapted.model(input_ids=torch.full((1, 62), 5))
    with pytest.raises((IndexError, RuntimeError)):
        base.adapted.model(input_ids=torch.full((1, 63), 5))
