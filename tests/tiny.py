"""Tiny random transformers models, trees to bind to them, and batches to feed them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import Plan
from fedalt.core.tree import Name, Tree

VOCAB = 64
HIDDEN = 32
LAYERS = 2
LABELS = 3
# Ten times the usual spread: with 0.02 attention is all but uniform and mistakes in it invisible.
SPREAD = 0.2

# Key and value heads are fewer than query heads: q_proj and v_proj then differ in shape.
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": SPREAD,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": SPREAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "num_labels": LABELS,
}

Model = Callable[[], PreTrainedModel]


def llama() -> PreTrainedModel:
    return _seeded(LlamaForCausalLM, LlamaConfig(**_LLAMA))


def mistral() -> PreTrainedModel:
    return _seeded(MistralForCausalLM, MistralConfig(**_LLAMA))


def qwen2() -> PreTrainedModel:
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**_LLAMA))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        initializer_range=SPREAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(GPT2LMHeadModel, config)


def gpt_neox() -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=SPREAD,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(GPTNeoXForCausalLM, config)


def bloom() -> PreTrainedModel:
    config = BloomConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_layer=LAYERS,
        initializer_range=SPREAD,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return _seeded(BloomForCausalLM, config)


def opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
        init_std=SPREAD,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
    )
    return _seeded(OPTForCausalLM, config)


def bert_classifier() -> PreTrainedModel:
    return _seeded(BertForSequenceClassification, BertConfig(**_BERT))


def roberta_classifier() -> PreTrainedModel:
    return _seeded(RobertaForSequenceClassification, RobertaConfig(**_BERT))


def llama_classifier() -> PreTrainedModel:
    return _seeded(LlamaForSequenceClassification, LlamaConfig(**_LLAMA, num_labels=LABELS))


CAUSAL: Mapping[str, Model] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "bloom": bloom,
    "opt": opt,
}
CLASSIFIERS: Mapping[str, Model] = {
    "bert_classifier": bert_classifier,
    "roberta_classifier": roberta_classifier,
    "llama_classifier": llama_classifier,
}
ALL: Mapping[str, Model] = {**CAUSAL, **CLASSIFIERS}


def _seeded(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0) -> Any:
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # a fresh bias is zero, and zeros hide mistakes
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids (batch, length) without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def random_tree(
    adapted: AdaptedModel,
    plan: Plan,
    *,
    clients: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tree:
    """A tree for the plan in which nothing is zero; with a client axis where `clients` is given."""
    generator = torch.Generator().manual_seed(seed)
    axis = () if clients is None else (clients,)
    return {
        name: torch.randn(*axis, *shape, generator=generator, dtype=dtype) * 0.2
        for name, shape in {**plan.shapes(adapted.sites), **adapted.heads}.items()
    }


def client_of(tree: Mapping[Name, Tensor], client: int) -> Tree:
    """One client's tree out of a tree with a client axis."""
    return {name: tensor[client] for name, tensor in tree.items()}


def stacked(*each: Mapping[Name, Tensor]) -> Tree:
    """Trees of single clients as one tree with a client axis."""
    return {name: torch.stack([tree[name] for tree in each]) for name in each[0]}


def trained(tree: Mapping[Name, Tensor]) -> Tree:
    """A copy of which every tensor is a leaf that wants a gradient."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tree.items()}


def gradients(loss: Tensor, tree: Mapping[Name, Tensor]) -> Tree:
    """The gradient of a loss with respect to every tensor of a tree."""
    return dict(zip(tree, torch.autograd.grad(loss, list(tree.values())), strict=True))
