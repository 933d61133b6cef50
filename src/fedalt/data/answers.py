"""An answer's ids, up to the token that ends it and no further, and what a reader sees of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedalt.data.chat_template import earlier_answers, ends_of, special_ids, turn_end
from fedalt.data.conversations import Chat
from fedalt.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Answer:
    """An answer's ids, the end included, and the text that a model which writes them has said."""

    ids: tuple[int, ...]
    text: str


def encode_answer(text: str, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """An answer's ids as they follow a prompt without chat template, its end token included.

    Also the ids of an option: its likelihood is compared with that of the others.
    """
    ids, ends = ids_of(text, tokenizer), ends_of(tokenizer)
    if ids and ids[-1] in ends:  # the text brings its end along
        return ids
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token (eos_token), answers need one")
    return (*ids, int(tokenizer.eos_token_id))


def plain_answer(text: str, tokenizer: "Tokenizer") -> Answer:
    """An answer or option as it is."""
    ids = encode_answer(text, tokenizer)
    return Answer(ids, text if len(ids) > len(ids_of(text, tokenizer)) else _said(ids, tokenizer))


def rendered_answer(
    content: str, both: tuple[str, str], prompt: tuple[int, ...], tokenizer: "Tokenizer"
) -> Answer:
    """What a chat template writes behind its prompt, up to the token that ends the answer.

    `both` are the prompt's text and what the template writes behind it.
    """
    end, (before, behind) = turn_end(tokenizer), both
    ids = _behind(prompt, before, behind, tokenizer)
    if end is not None and end in ids:
        ids = ids[: len(ids) - ids[::-1].index(end)]
    else:
        behind = behind.rstrip()  # the line end before the next turn
        ids = _behind(prompt, before, behind, tokenizer)
        if not ids or ids[-1] not in special_ids(tokenizer):
            last = tokenizer.eos_token_id if end is None else end
            if last is None:
                raise DataError(
                    "neither the tokenizer nor its chat template has a token that ends an answer"
                )
            ids = (*ids, int(last))
    said = _said(ids, tokenizer)
    # Mostly that is the content, but for what tokenizers make of some letters.
    same = said == _said(ids_of(content, tokenizer), tokenizer)
    return Answer(ids, content if same else said)


def earlier_positions(
    chat: Chat, prompt: tuple[int, ...], tokenizer: "Tokenizer"
) -> frozenset[int]:
    """Where in a conversation's prompt its earlier answers stand, each with the token that ends it.

    A template that ends only the last answer gives the earlier ones no end. Raises DataError.
    """
    positions: set[int] = set()
    for place, before, behind in earlier_answers(chat, tokenizer):
        begin = ids_of(before, tokenizer)
        answer = rendered_answer("", (before, behind), begin, tokenizer).ids
        written = prompt[len(begin) : len(begin) + len(answer)]
        if prompt[: len(begin)] != begin or written[: len(answer) - 1] != answer[:-1]:
            raise DataError(
                f"the answer in {place!r} has other tokens once the conversation goes on, so it "
                "cannot be trained; expected --train-on last"
            )
        ended = len(answer) - (written != answer)
        positions.update(range(len(begin), len(begin) + ended))
    return frozenset(positions)


def _behind(
    prompt: tuple[int, ...], before: str, behind: str, tokenizer: "Tokenizer"
) -> tuple[int, ...]:
    """The ids of a text that goes on, as they are in the whole wherever that leaves the prompt."""
    whole = ids_of(before + behind, tokenizer)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return ids_of(behind, tokenizer)


def _said(ids: Sequence[int], tokenizer: "Tokenizer") -> str:
    """What a reader sees of an answer's ids."""
    return str(tokenizer.decode(without_end(ids, tokenizer), skip_special_tokens=True)).strip()


def without_end(ids: Sequence[int], tokenizer: "Tokenizer", ends: Sequence[int] = ()) -> list[int]:
    """An answer's ids up to the first that ends it; that one, too, if it is part of its text."""
    all_ends = {*ends_of(tokenizer), *ends}
    at = next((at for at, token in enumerate(ids) if token in all_ends), len(ids))
    if at < len(ids) and ids[at] not in _no_text(tokenizer, len(tokenizer)):
        at += 1
    return list(ids[:at])


@lru_cache(maxsize=8)
def _no_text(tokenizer: "Tokenizer", _: int) -> frozenset[int]:
    """Tokens beside the vocabulary, of a tokenizer of this size: some have thousands."""
    return special_ids(tokenizer) | frozenset(tokenizer.get_added_vocab().values())


def ids_of(text: str, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The ids of a text alone, with nothing put before or behind it."""
    return tuple(int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
