"""Base models on disk, servings to export from them, and what both ought to compute."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import fedalt
from fedalt.adapters.plan import Mixer, Plan, Router, Slot, Sum, single
from fedalt.methods.contract import Serving
from fedalt.models.base import Base, load_base

TWO = (Slot("individual", 2, 4.0), Slot("rest_of_world", 3, 1.5))
MIXED = Plan(TWO, Mixer(), dropout=0.3)
PLANS = {
    "mixer": MIXED,
    "fixed sum": Plan(TWO, Sum((0.25, 2.0))),
    "single": single(Slot("shared", 4, 8.0)),
    "router": Plan((*TWO, Slot("third", 2, 4.0)), Router(1, "code", False), dropout=0.3),
}
LABELS = ("no", "maybe", "yes")
IDS = tiny.tokens(3, 7)

_FOLDER = tempfile.TemporaryDirectory()  # removed when the tests end


@cache
def base_of(kind: str, targets: str | None = None) -> Base:
    """A tiny model that lies on disk with a tokenizer."""
    folder = Path(_FOLDER.name) / f"{kind}-{targets}"
    tiny.ALL[kind]().save_pretrained(folder)
    words = {f"w{index}": index for index in range(tiny.VOCAB)}
    splitter = Tokenizer(models.WordLevel(words, unk_token="w3"))
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)
    labels = LABELS if kind in tiny.CLASSIFIERS else ()
    return load_base(str(folder), labels=labels, targets=targets, device="cpu")


def serving_for(base: Base, plan: Plan = MIXED, seed: int = 0) -> Serving:
    return Serving(plan, tiny.random_tree(base.adapted, plan, seed=seed))


def load(folder: Path) -> Any:
    return fedalt.load(folder, device="cpu")


def plain(base: Base, **options: Any) -> Any:
    """The base model as anybody loads it."""
    if base.adapted.heads:
        return AutoModelForSequenceClassification.from_pretrained(
            base.name, num_labels=len(LABELS), **options
        )
    return AutoModelForCausalLM.from_pretrained(base.name, **options)


@torch.no_grad()
def bound_logits(base: Base, serving: Serving, ids: Tensor = IDS) -> Tensor:
    with base.adapted.bound(serving.plan, serving.tree) as model:
        logits: Tensor = model(input_ids=ids).logits
    return logits


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
