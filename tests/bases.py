"""A tiny random base model with a tokenizer of single letters, and examples for it."""

import string
from collections.abc import Callable, Sequence

import torch
from tiny import VOCAB, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import Plan
from fedalt.core.tree import Tree
from fedalt.data.examples import Example
from fedalt.models.base import Base
from fedalt.models.identity import identify
from fedalt.training.group import Share, Trained, Training
from fedalt.training.loop import train_together
from fedalt.training.orders import Fit


def letters() -> PreTrainedTokenizerFast:
    """One token for every letter, digit and space; three special ones in front."""
    signs = ["<pad>", "<s>", "</s>", *string.ascii_letters, *string.digits[:7], " ", "\n"]
    assert len(signs) == VOCAB
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(signs)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def base_of(model: PreTrainedModel | None = None, targets: str | None = None) -> Base:
    """A base model around a tiny Llama, or around the given model."""
    model = llama() if model is None else model
    fingerprint = identify(model).short
    return Base(AdaptedModel(model, targets), letters(), "tiny random", fingerprint)


def example(prompt: str, answer: str, options: tuple[str, ...] = ()) -> Example:
    """A text example."""
    tokenizer = letters()
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return Example((*before, *after), len(before), answer, options)


def start_of(base: Base, seed: int = 0) -> Initializer:
    """Draws starts for a base model."""
    return Initializer(base.adapted.sites, base.adapted.heads, seed)


def random_serving_tree(base: Base, plan: Plan, seed: int = 0) -> Tree:
    """A tree in which nothing is zero."""
    stream = torch.Generator().manual_seed(seed)
    shapes = {**plan.shapes(base.adapted.sites), **base.adapted.heads}
    return {name: torch.randn(shape, generator=stream) * 0.2 for name, shape in shapes.items()}


def train(
    base: Base,
    order: Fit,
    examples: Sequence[Example],
    training: Training,
    *,
    seed: int,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Carry out an order on one client's examples; see `train_together`."""

    def hear(_: int, done: int, of: int, loss: float) -> None:
        if on_step is not None:
            on_step(done, of, loss)

    return train_together(base, [Share(order, examples, seed)], training, hear)[0]
