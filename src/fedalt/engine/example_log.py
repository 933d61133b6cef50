"""What a run's folder tells of scores beyond metrics: mixers' weights, best and worst examples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from fedalt.data.examples import Example
from fedalt.evaluation import Scores
from fedalt.evaluation.gate_statistics import Weighing, weights_of
from fedalt.methods.contract import Serving
from fedalt.models.base import Base

BEST_AND_WORST: Final = 3
LONGEST_PROMPT: Final = 2000  # characters
_GAP: Final = " ... "


def mixer_facts(weighing: Weighing) -> dict[str, object]:
    """What rounds.jsonl holds of a mixer's or router's weights."""
    return {
        "slots": list(weighing.slots),
        "weights": {
            site: [rounded(w) for w in weights] for site, weights in weighing.weights.items()
        },
        "histogram": list(weighing.histogram),
    }


def example_log(
    base: Base, serving: Serving, examples: Sequence[Example], scores: Scores
) -> Iterator[Mapping[str, object]]:
    """The worst examples of a client, worst first, and then the best, best first.

    Up to three of each, none twice, by the mean loss of an answer's token. Where a mixer or router
    weighs the slots, `tokens` are the text in pieces, prompt and reference, and with each the
    weight of the first slot, the mean over sites.
    """
    order = sorted(range(len(examples)), key=lambda at: -scores.losses[at])
    worst, rest = order[:BEST_AND_WORST], order[BEST_AND_WORST:]
    for at in [*worst, *rest[: -BEST_AND_WORST - 1 : -1]]:
        example = examples[at]
        prompt = base.tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
        line: dict[str, object] = {
            "prompt": _cut(prompt),
            "reference": example.answer,
            "prediction": scores.predictions[at] if scores.predictions else None,
            "loss": rounded(scores.losses[at]),
        }
        gated = serving.plan.gate is not None
        weights = weights_of(base, serving, example.ids, example.segments) if gated else None
        if weights is not None:
            texts = zip(pieces(base.tokenizer, example.ids), weights[:, 0].tolist(), strict=True)
            line["slots"] = [slot.name for slot in serving.plan.slots]
            tokens = _without_middle(list(texts), example.answer_start)
            line["tokens"] = [[text, rounded(weight)] for text, weight in tokens]
        yield line


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the decoded text without special tokens.

    A character of several tokens goes with its last one.
    """
    texts: list[str] = []
    begin = read = 0  # what is decoded again, because a token's text depends on the one before
    for end in range(1, len(ids) + 1):
        before, now = (
            str(tokenizer.decode(ids[begin:upto], skip_special_tokens=True)) for upto in (read, end)
        )
        if end < len(ids) and (now.endswith("\N{REPLACEMENT CHARACTER}") or now == before):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        begin, read = read, end
    return texts


def rounded(number: float) -> float:
    """To four significant digits."""
    return float(f"{number:.4g}")


def _cut(text: str) -> str:
    """A text without its middle, where it is too long."""
    if len(text) <= LONGEST_PROMPT:
        return text
    half = (LONGEST_PROMPT - len(_GAP)) // 2
    return f"{text[:half]}{_GAP}{text[-half:]}"


def _without_middle(tokens: list[tuple[str, float]], prompt: int) -> list[tuple[str, float]]:
    """The same for a prompt of so many tokens; for those left out stands their mean weight."""
    half = (LONGEST_PROMPT - len(_GAP)) // 2
    if sum(len(text) for text, _ in tokens[:prompt]) <= LONGEST_PROMPT:
        return tokens
    head = _fits(tokens[:prompt], half)
    tail = prompt - _fits(tokens[:prompt][::-1], half)
    left_out = [weight for _, weight in tokens[head:tail]]
    return [*tokens[:head], (_GAP, sum(left_out) / len(left_out)), *tokens[tail:]]


def _fits(tokens: Sequence[tuple[str, Any]], room: int) -> int:
    """How many of the first tokens have no more characters than this."""
    count = 0
    for text, _ in tokens:
        room -= len(text)
        if room < 0:
            break
        count += 1
    return count
