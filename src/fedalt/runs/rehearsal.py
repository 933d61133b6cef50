"""A rehearsal: a tiny run of a method, whose numbers tell whether its code still does the same.

It takes about a second, needs neither the run's data nor its base model, and is the same on every
machine but for rounding. So numbers that were taken by other code, or elsewhere, can stand beside
today's: if the rehearsals agree, the method, its training and its scoring are what they were.
"""

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fedalt.core.files import make_private_folder, write_private
from fedalt.core.settings import DataSettings, ModelSettings, Scoring, Training
from fedalt.runs.lifecycle import start_run
from fedalt.runs.settings import Settings, lora_of, settings_of_method
from fedalt.runs.setup import prepare

TOLERANCE: Final = 1e-3  # relative: rounding is below a hundredth of it
_ROUNDS: Final = 4  # more than the methods' usual warm-ups
_ANSWERS: Final = {"a": "yes", "b": "no", "c": "yes"}
_EXAMPLES: Final = {"a": 9, "b": 6, "c": 4}  # unequal, so that weights in a mean are seen


def rehearse(settings: Settings, *, classifier: bool) -> list[float]:
    """Losses and accuracies of three clients' tiny run with these settings of the method.

    Everything else is the rehearsal's own: data, a random base model, rates, and how far adapters
    reach. At most four rounds of two epochs are run.
    """
    with TemporaryDirectory(prefix="fedalt-rehearsal-") as folder:
        place = Path(folder)
        _write_model(place / "model", classifier=classifier)
        _write_data(place / "data", classifier=classifier)
        prepared = prepare(_small(settings, place))
        lines = start_run(prepared, place / "run").lines()
    return [float(f"{number:.7g}") for number in _numbers(lines)]


def difference(then: Sequence[float], now: Sequence[float]) -> str:
    """The first number of two rehearsals that is another one; "" where they agree."""
    for at, (before, after) in enumerate(zip_longest(then, now), 1):
        if before is None or after is None:
            return f"it had {len(then)} numbers and has {len(now)}"
        if not isclose(before, after, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return f"its number {at} was {before:g} and is {after:g}"
    return ""


def _numbers(lines: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Training losses round by round, then what was scored on test data."""
    for line in lines:
        if line["kind"] == "train":
            yield line["metrics"]["loss"]
        elif line["kind"] == "score" and line["split"] == "test":
            yield from (line["metrics"][name] for name in ("loss", "accuracy"))


def _small(settings: Settings, place: Path) -> Settings:
    """The settings with what belongs to the method, and little else."""
    size = lora_of(settings.method)
    named = {
        # Whoever a method's settings name takes part here under another name.
        key: dict(zip(_EXAMPLES, (value[client] for client in sorted(value)), strict=False))
        for key in settings_of_method(settings.method)
        if isinstance(value := getattr(settings.method, key), Mapping)
    }
    lora = replace(size, alpha=2.0 * size.rank)  # every cell's rehearsal is as sensitive
    training, rounds = settings.training, settings.rounds
    privacy = settings.privacy
    if privacy.unit is not None:  # whose noise is drawn anew each time
        privacy = replace(privacy, seed=0)
    return replace(
        settings,
        data=DataSettings(path=place / "data", max_length=64, validation=0.0),
        model=ModelSettings(name=str(place / "model"), device="cpu"),
        method=replace(settings.method, lora=lora, **named),  # type: ignore[type-var]
        training=Training(
            lr=1e-2,
            batch_size=4,
            local_epochs=min(training.local_epochs, 2),
            weight_decay=training.weight_decay,
            clip=training.clip,
            carry_optimizer=training.carry_optimizer,
        ),
        rounds=replace(rounds, rounds=min(rounds.rounds, _ROUNDS), select="last", test=True),
        scoring=Scoring(options=settings.scoring.options, generate=False, base=False),
        privacy=privacy,
        clients={},  # none of whom takes part
        seed=0,
        local_baseline=False,
    )


def _write_data(folder: Path, *, classifier: bool) -> None:
    """Three clients who are asked alike and do not all answer alike."""
    make_private_folder(folder)
    for client, count in _EXAMPLES.items():
        for split, first in (("train", 0), ("test", 50)):
            lines = []
            for n in range(first, first + count):
                answer = _ANSWERS[client] if n % 3 else "no"
                asked = {"instruction": f"{n} even", "output": answer, "options": ["yes", "no"]}
                record = {"text": f"{n} even", "label": answer} if classifier else asked
                lines.append(json.dumps(record))
            write_private(folder / f"{client}.{split}.jsonl", "\n".join(lines))


def _write_model(folder: Path, *, classifier: bool) -> None:
    """A random model of two layers, large enough in its numbers that clients matter to it."""
    signs = ["<pad>", "<s>", "</s>", *string.ascii_letters, *string.digits, " ", "\n"]
    letters = Tokenizer(models.WordLevel({s: at for at, s in enumerate(signs)}, " "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    special = dict(zip(("pad_token", "bos_token", "eos_token"), signs, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **special)
    config = LlamaConfig(
        vocab_size=len(signs),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kind = LlamaForSequenceClassification if classifier else LlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
