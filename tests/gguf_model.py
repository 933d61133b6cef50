"""A tiny random Llama as a GGUF file, written as llama.cpp's converter writes one."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    *(chr(code) for code in range(33, 127)),
    "\u0120",
    "ab",
    "<|endoftext|>",
]
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"


def tiny_llama(**rotations: object) -> LlamaForCausalLM:
    """Two layers, grouped key-value heads; its numbers are exact in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rotations},
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():  # not the buffers of its rotations
            weights.copy_(weights.bfloat16())
    return model


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    architecture: str = "llama",
    tensors: Mapping[str, torch.Tensor] | None = None,
    beside: Mapping[str, torch.Tensor | str] | None = None,
) -> Path:
    """The model in float32 with a byte-pair vocabulary of single characters.

    `tensors` take the place of its own; `beside` are tensors and texts under the names of the file.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 4), 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in (model.state_dict() if tensors is None else tensors).items():
        module = name.removesuffix(".weight")
        count = heads.get(module.rpartition(".")[2])
        if count is not None:  # llama.cpp turns neighbouring pairs of numbers, not halves
            rows, columns = tensor.shape
            tensor = tensor.reshape(count, 2, rows // count // 2, columns).transpose(1, 2)
            tensor = tensor.reshape(rows, columns)
        writer.add_tensor(f"{names.get_name(module)}.weight", tensor.contiguous().numpy())
    for name, value in (beside or {}).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
