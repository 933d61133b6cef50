"""An adapter for llama.cpp: its names, its order, and the numbers of the PEFT export."""

import pytest
import torch
from commands import call
from exported import PLANS, serving_for
from exported import base_of as base_on_disk
from gguf_model import tiny_llama
from safetensors.torch import load_file

from fedalt.export.fixed import with_fixed_weights
from fedalt.export.folders import export_individual
from fedalt.export.llama_cpp import FILE, export_gguf, in_pairs

gguf = pytest.importorskip("gguf", reason="`pip install 'fedalt[gguf]'` has not been called")
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def in_halves(rows, heads):
    """As llama.cpp's rows are in transformers: each head's even rows, then its odd ones."""
    by_head = rows.reshape(heads, -1, rows.shape[-1])
    return torch.cat([by_head[:, ::2], by_head[:, 1::2]], 1).reshape(rows.shape)


def test_rows_of_a_head_go_in_pairs():
    rows = torch.arange(8.0)[:, None]  # two heads of four
    assert in_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(in_halves(in_pairs(rows, 2), 2), rows)


def test_the_file_read_back_is_the_peft_export(tmp_path):
    base = base_on_disk("llama")
    config = base.adapted.model.config
    fixed = with_fixed_weights(serving_for(base, PLANS["fixed sum"]), base, (), ()).serving
    export_gguf(fixed, base, tmp_path / "gguf", readme="read me")
    export_individual(fixed, base, tmp_path / "peft")
    plain = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    read = gguf.GGUFReader(tmp_path / "gguf" / FILE)
    facts = {name: field.contents() for name, field in read.fields.items()}
    assert facts["general.architecture"] == "llama"
    assert facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora"
    (slot,) = fixed.plan.slots
    assert facts["adapter.lora.alpha"] == slot.alpha
    tensors = {each.name: torch.tensor(each.data) for each in read.tensors}
    assert len(tensors) == len(plain) == 2 * len(base.adapted.sites)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        _, layer, part, _, _ = name.split(".")
        a, b = tensors[name], tensors[name.replace("lora_a", "lora_b")]
        product = b @ a
        if part in heads:
            product = in_halves(product, heads[part])
        site = f"base_model.model.model.layers.{layer}.{PARTS[part]}"
        wanted = plain[f"{site}.lora_B.weight"] @ plain[f"{site}.lora_A.weight"]
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-6)
    assert {file.name for file in (tmp_path / "gguf").iterdir()} == {FILE, "README.md"}
    assert (tmp_path / "gguf" / FILE).stat().st_mode & 0o777 == 0o600


def test_transformers_undoes_the_same_order():
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    config = tiny_llama().config
    undo = LlamaTensorProcessor(config.to_dict())
    for part, heads in (("attn_q", 4), ("attn_k", 2)):
        rows = torch.randn(8 * heads, 3)
        back = undo.process(in_pairs(rows, heads).numpy(), f"blk.0.{part}.weight").weights
        assert torch.equal(torch.tensor(back), rows)


def test_another_architecture_is_refused_in_one_sentence(tmp_path):
    base = base_on_disk("gpt2")
    fixed = with_fixed_weights(serving_for(base, PLANS["fixed sum"]), base, (), ()).serving
    with pytest.raises(ValueError, match=r"cannot write an adapter of a gpt2 model; expected"):
        export_gguf(fixed, base, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_the_command_names_the_server(finished_run, tmp_path):
    out = tmp_path / "out"
    assert call("export", finished_run, "--client", "a", "--format", "gguf", "--out", out) == 0
    readme = (out / "README.md").read_text()
    assert "llama-server --model BASE.gguf --lora adapter.gguf" in readme
    assert "nats a token instead of" in readme
