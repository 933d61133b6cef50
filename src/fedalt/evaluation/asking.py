"""What a model is asked with: prompts with room for an answer, the tokens that end one, how.

All that writes answers goes through here, so that scoring, `generate` and `chat` ask alike, and an
exported folder's README tells the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel

from fedalt.core.settings import Scoring
from fedalt.data.chat_template import ends_of
from fedalt.data.prompts import cut_prompt
from fedalt.evaluation.group import Ids
from fedalt.models.base import Base


def room_of(base: Base, scoring: Scoring) -> int:
    """The most tokens of a prompt: what the model can number, less the answer to be written.

    An answer takes no more than half.
    """
    return max(1, base.positions - min(scoring.max_new_tokens, base.positions // 2))


def fitted(base: Base, prompt: Ids, scoring: Scoring) -> tuple[int, ...]:
    """A prompt without so much of its middle that its answer fits behind it."""
    return cut_prompt(prompt, base.tokenizer, room_of(base, scoring))


def longest_answer(base: Base, prompt: Ids, scoring: Scoring) -> int:
    """How many tokens may be written behind a fitted prompt."""
    return max(1, min(scoring.max_new_tokens, base.positions - len(prompt)))


def ends(base: Base) -> tuple[int, ...]:
    """Every token that ends an answer.

    The tokenizer's end of text, the chat template's end of a turn, and what model and generation
    configuration name as ends at the time of the call: chat models name several.
    """
    model = base.adapted.model
    tokens: list[int | None] = [*ends_of(base.tokenizer)]
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        named = getattr(config, "eos_token_id", None)
        tokens += named if isinstance(named, list | tuple) else [named]
    return tuple(dict.fromkeys(int(token) for token in tokens if token is not None and token >= 0))


def greedily(base: Base, scoring: Scoring, new_tokens: int) -> GenerationConfig:
    """Greedy or beam search and nothing else."""
    return GenerationConfig(
        max_new_tokens=new_tokens,
        num_beams=scoring.beams,
        do_sample=False,
        pad_token_id=base.pad_id,
        eos_token_id=list(ends(base)) or None,
        return_dict_in_generate=True,
        use_cache=True,
    )


@contextmanager
def without_card(model: PreTrainedModel) -> Iterator[None]:
    """Within this context nothing of a model's own generation configuration takes part.

    Transformers takes from it whatever a call leaves open: penalties, forbidden words, lengths.
    """
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
