"""Try fedalt on a tiny random model of every architecture that transformers offers.

    python scripts/architectures.py [--write | TYPE...]

For each: the answer loss next to that of transformers, a training step, greedy text next to that of
transformers, and the exported adapter next to what PEFT makes of it, merged as well. Where fedalt
refuses a model the table has its sentence.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from tiny_architectures import CAUSAL, CLASSIFIERS, LABELS, build
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Slot, single
from fedalt.data.examples import Example
from fedalt.evaluation import Scoring, generate, score, score_together
from fedalt.evaluation.asking import ends as ends_of
from fedalt.export.folders import export_individual
from fedalt.methods.contract import Serving
from fedalt.models.base import Base, ModelError, load_base
from fedalt.training.group import Share, Training
from fedalt.training.loop import train_together
from fedalt.training.orders import Fit

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
PLAN = single(Slot("individual", 2, 4.0))
# Differences that are rounding. PEFT's own adapter of qwen3_next differs by 1.3e-4 when merged.
LOSS, LOGITS = 1e-5, 2e-4
TEXTS = ("the cat sat", "a dog ran to the tree and back")
ANSWERS = ("yes it did", "no")
# Two clients of two texts each: a batch holds both.
SCORING = Scoring(batch_size=4, generate=False, max_new_tokens=8)


@dataclass(frozen=True)
class Row:
    """What became of one architecture; differences are the largest, None: not tried."""

    kind: str
    model: str
    sites: int = 0
    loss: float | None = None
    trained: bool | None = None
    same_text: bool | None = None
    exported: float | None = None
    together: float | None = None
    padding: bool = False  # told: the model does not overlook padding
    refused: str = ""

    @property
    def right(self) -> bool:
        """Whether everything agrees, or the model is refused."""
        return bool(self.refused) or (
            ((self.loss or 0) < LOSS or self.padding)
            and self.trained is not False
            and self.same_text is not False
            and (self.exported or 0) < LOGITS
            and (self.together or 0) < LOSS
        )


def tried(kind: str, *, classifies: bool, folder: Path) -> Row:
    """One architecture through all that fedalt does with a base model."""
    name = (CLASSIFIERS if classifies else CAUSAL)[kind]
    row = Row(kind, name)
    labels = LABELS if classifies else ()
    try:
        base = _load(folder, labels)
    except ModelError as error:
        return replace(row, refused=_sentence(error, folder))
    examples = _examples(base, labels)
    init = Initializer(base.adapted.sites, base.adapted.heads, 0, given=base.given)
    tree = {**init.adapter(PLAN.slots[0]), **init.head()}
    padding = any("changes with the padding" in note for note in base.notes)
    row = replace(row, padding=padding)
    plain = _plain(folder, labels, tree)
    row = replace(row, sites=len(base.adapted.sites), loss=_loss(base, plain, tree, examples))
    if not classifies:
        row = replace(row, same_text=_same_text(base, plain, examples))
    order = Fit(PLAN, tree, frozenset(tree), epochs=1)
    training = Training(lr=0.05, batch_size=2)
    (fitted,) = train_together(base, [Share(order, examples, seed=0)], training)
    moved = [not torch.equal(tensor.cpu(), tree[each]) for each, tensor in fitted.tree.items()]
    row = replace(row, trained=any(moved) and fitted.loss == fitted.loss)
    after = Serving(PLAN, _varied(fitted.tree))
    alone = score(base, after, examples, SCORING).losses
    both = score_together(base, [(Serving(PLAN, tree), examples), (after, examples)], SCORING)
    row = replace(row, together=_most(both[1].losses, alone))
    return replace(row, exported=_exported(base, after, plain, examples, folder))


def _load(folder: Path, labels: Sequence[str]) -> Base:
    """With PEFT's default sites, or all linear layers where it has none."""
    try:
        return load_base(str(folder), labels=labels, device="cpu")
    except ModelError as error:
        if "no default sites" not in str(error):
            raise
        return load_base(str(folder), labels=labels, targets="all-linear", device="cpu")


def _examples(base: Base, labels: Sequence[str]) -> list[Example]:
    found = []
    for at, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
        ids = tuple(base.tokenizer(text)["input_ids"])
        if labels:
            found.append(Example(ids, len(ids), labels[at], tuple(labels), label=at))
        else:
            after = (*base.tokenizer(answer)["input_ids"], base.tokenizer.eos_token_id)
            found.append(Example((*ids, *after), len(ids), answer, ()))
    return found


def _plain(folder: Path, labels: Sequence[str], tree: Any) -> Any:
    """The same model as anybody loads it, with the head that training begins with."""
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    for name, tensor in tree.items():
        if name.slot == HEAD:
            model.get_submodule(name.site).get_parameter(name.factor).data.copy_(tensor)
    model.config.use_cache = True
    return model


@torch.no_grad()
def _loss(base: Base, plain: Any, tree: Any, examples: Sequence[Example]) -> float:
    found = score(base, Serving(PLAN, tree), examples, SCORING).losses
    wanted = []
    for example in examples:
        logits = plain(input_ids=torch.tensor([example.ids])).logits[0]
        if example.label is not None:
            wanted.append(float(functional.cross_entropy(logits, torch.tensor(example.label))))
        else:
            answer = torch.tensor(example.ids[example.answer_start :])
            before = logits[example.answer_start - 1 : -1]
            wanted.append(float(functional.cross_entropy(before, answer)))
    return _most(found, wanted)


@torch.no_grad()
def _same_text(base: Base, plain: Any, examples: Sequence[Example]) -> bool:
    # Without what a configuration adds to greedy decoding, such as an end that is forced.
    ends = list(ends_of(base))
    for model in (plain, base.adapted.model):
        model.generation_config = GenerationConfig(eos_token_id=ends, use_cache=True)
    prompts = [example.prompt_ids for example in examples]
    found = generate(base, None, prompts, SCORING)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=base.pad_id,
        )[0, len(prompt) :]
        wanted.append(base.tokenizer.decode(out, skip_special_tokens=True).strip())
    return found == wanted


def _varied(tree: Any) -> Any:
    """A tree in which nothing is small, so that a tensor at the wrong place shows."""
    stream = torch.Generator().manual_seed(3)
    return {
        name: tensor.cpu() + 0.1 * torch.randn(tensor.shape, generator=stream)
        for name, tensor in tree.items()
    }


@torch.no_grad()
def _exported(
    base: Base, serving: Serving, plain: Any, examples: Sequence[Example], folder: Path
) -> float:
    """The largest difference of logits to PEFT's, adapter and merged, relative to their size."""
    out = export_individual(serving, base, folder / "exported")
    model = PeftModel.from_pretrained(plain, str(out)).eval()
    worst = 0.0
    for merged in (False, True):
        other: Any = model.merge_and_unload() if merged else model
        for example in examples:
            ids = torch.tensor([example.ids])
            with base.adapted.bound(serving.plan, serving.tree) as bound:
                wanted = bound(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            found = other(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    return worst


def _most(found: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(one - two) for one, two in zip(found, wanted, strict=True))


def _sentence(error: Exception, folder: Path) -> str:
    text = str(error).replace(str(folder), "MODEL").replace("|", "/").split("\n")[0]
    return text if len(text) < 300 else text[:297] + "..."


def main() -> int:
    """Try all, or the named types; print a line for each, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    asked = parser.parse_args()
    if unknown := sorted({*asked.types} - {*CAUSAL, *CLASSIFIERS}):
        parser.error(f"transformers has no architecture {', '.join(unknown)}")
    if asked.types and asked.write:
        parser.error("--write takes no types: the page is of all architectures")
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[bool, list[Row]] = {False: [], True: []}
    unbuilt: list[str] = []
    for classifies, kinds in ((False, CAUSAL), (True, CLASSIFIERS)):
        for kind in sorted(asked.types or kinds):
            if kind not in kinds:
                continue
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                try:
                    build(kind, classifies=classifies, folder=place)
                except Exception as error:
                    unbuilt.append(kind)
                    print(f"-  {kind}: not built: {type(error).__name__} {str(error)[:90]!r}")
                    continue
                try:
                    row = tried(kind, classifies=classifies, folder=place)
                except Exception as error:
                    print(f"!! {kind}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    found[classifies].append(Row(kind, kinds[kind], loss=float("nan")))
                    continue
            found[classifies].append(row)
            print(f"{'ok' if row.right else '??'} {row}", flush=True)
    if asked.write:
        from architectures_page import page

        PAGE.write_text(page(found[False], found[True], sorted(set(unbuilt))), encoding="utf-8")
    return 0 if all(row.right for rows in found.values() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
