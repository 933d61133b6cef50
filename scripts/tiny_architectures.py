"""Tiny random models of the architectures that transformers offers, with a tokenizer, on disk."""

import inspect
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

VOCAB = 64
LABELS = ("no", "maybe", "yes")
MOST = (
    3_000_000  # numbers: what stays larger than this has sizes of its own that are not known here
)
CAUSAL: Mapping[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSIFIERS: Mapping[str, str] = dict(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)

# Tried on every configuration that knows the name. Key and value heads are fewer than query heads.
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_labels": len(LABELS),
    "embedding_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "n_layers": 2,
    "n_heads": 4,
    "dim": 32,
    "emb_dim": 32,
    "hidden_dim": 48,
    "ffn_dim": 48,
    "dff": 48,
    "n_inner": 48,
    "rotary_dim": 8,
    "word_embed_proj_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "attention_heads": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "lru_width": 32,
    "kv_channels": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "initializer_range": 0.2,
    "init_std": 0.2,
}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "mpt": {"max_seq_len": 128},
    "gemma3": {
        "text_config": {"sliding_window": 16},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 1,
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
    },
    "roberta": {"is_decoder": True},
    "bert": {"is_decoder": True},
    "mixtral": {"sliding_window": None},
    "nemotron_h": {"hybrid_override_pattern": "M*"},
    "xlnet": {"d_inner": 48},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 48},
    "deberta-v2": {"position_buckets": 16, "relative_attention": True, "share_att_key": True,
                   "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"},
}  # fmt: skip


# Where a model does not run with the sizes above, others are tried: of architectures whose key and
# value heads are the query's, or that have no size of a head of their own.
_ELSE: Sequence[Mapping[str, Any]] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"num_key_value_heads": 4, "head_dim": None},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"num_hidden_layers": 4},
)


def build(kind: str, *, classifies: bool, folder: Path) -> None:
    """Save a tiny random model of a type and its tokenizer. Raises where none of them runs."""
    name = (CLASSIFIERS if classifies else CAUSAL)[kind]
    first: Exception | None = None
    for change in _ELSE:
        try:
            _running(getattr(transformers, name), _config(kind, change)).save_pretrained(folder)
        except Exception as error:  # sizes that do not fit may fail in any way
            first = first or error
        else:
            letters(ends_texts=classifies).save_pretrained(folder)
            return
    assert first is not None
    raise first


@torch.no_grad()
def _running(built: Any, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(each.numel() for each in built(config).parameters())
    if size > MOST:
        raise ValueError(f"{size} numbers remain")
    torch.manual_seed(1)
    model: PreTrainedModel = built(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # attention that is not uniform
    ids = torch.tensor([[1, *range(5, 18), 2]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return model


def _config(kind: str, change: Mapping[str, Any]) -> Any:
    config = CONFIG_MAPPING[kind]
    own = dict(_OWN.get(kind, {}))
    values = _known(config, {**_SIZES, **change}) | own
    for part, of in getattr(config, "sub_configs", {}).items():
        if part == "text_config" and part in own:
            values[part] = {**_known(of, _SIZES), **own[part]}
    return config(**values)


def _known(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {*inspect.signature(config).parameters, *getattr(config, "attribute_map", {})}
    always = ("num_labels", "bos_token_id", "eos_token_id", "pad_token_id")
    found = {key: each for key, each in values.items() if key in names or key in always}
    # One of two names for the same size is enough, and its own name is the one it is stored by.
    for alias, name in getattr(config, "attribute_map", {}).items():
        if alias in found and name in found:
            del found[alias]
    return found


def letters(*, ends_texts: bool = False) -> PreTrainedTokenizerFast:
    """One token for every letter, digit and space; three special ones in front.

    Some classifiers look for the token that ends a text, which their own tokenizers write.
    """
    signs = ["<pad>", "<s>", "</s>", *string.ascii_letters, *string.digits[:7], " ", "\n"]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(signs)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if ends_texts:
        end = ("</s>", signs.index("</s>"))
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
