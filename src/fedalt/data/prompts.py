"""From a record to token ids: the template, the cut to a maximal length, where the answer begins.

The prompt's ids are the same whether an answer follows or is to be generated. The loss is on the
answer and the token that ends it: the end-of-text token, or the one that ends a turn in the model's
chat template. Nothing is put twice before or behind a text that brings it along.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from fedalt.data.answers import Answer, earlier_positions, ids_of, plain_answer, rendered_answer
from fedalt.data.answers import encode_answer as encode_answer
from fedalt.data.chat_template import asked, asked_and_answered
from fedalt.data.encodings import EncodingError, decoded
from fedalt.data.examples import Example
from fedalt.data.records import Chat, Completion, DataError, Instruction, LabeledText, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DEFAULT_TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"


@dataclass(frozen=True)
class Template:
    """The text around an instruction; the answer follows at its end.

    `{instruction}` is required. Without `{input}` an input follows the instruction after a blank
    line, so that no text is lost. A brace of the text itself is doubled: `{{`.
    """

    text: str = DEFAULT_TEMPLATE
    source: str = "the template"

    def __post_init__(self) -> None:
        try:
            fields = [
                field if not form and not conversion else f"{field}!{conversion}:{form}"
                for _, field, form, conversion in Formatter().parse(self.text)
                if field is not None
            ]
        except ValueError as error:
            raise DataError(
                f"{self.source}: {error}; a brace that stands for itself is written twice"
            ) from None
        if unknown := [field for field in fields if field not in ("instruction", "input")]:
            raise DataError(
                f"{self.source}: unknown placeholder {{{unknown[0]}}}; expected {{instruction}} "
                "and, if wanted, {input}; the answer follows at the end by itself"
            )
        if "instruction" not in fields:
            raise DataError(f"{self.source}: the placeholder {{instruction}} is missing")

    def render(self, record: Instruction) -> str:
        """The prompt of a record."""
        if "{input}" in self.text.replace("{{", ""):
            return self.text.format(instruction=record.instruction, input=record.input)
        return self.text.format(instruction=record.question)


def read_template(file: Path | None) -> Template:
    """A template from a text file, taken as it is, a line end at its end included.

    Without a file, the usual one.
    """
    if file is None:
        return Template()
    try:
        text = decoded(file.read_bytes()).replace("\r\n", "\n")  # as Python reads text
    except (OSError, EncodingError) as error:
        raise DataError(f"{file}: cannot be read as a template ({error})") from None
    return Template(text, str(file))


@dataclass(frozen=True)
class Encoded:
    """An example and what the maximal length took from it, in tokens.

    `prompt_cut` were taken from the prompt's middle, or from a classifier's text; `answer_cut`
    from the answer's end, which then has no end-of-text token.
    """

    example: Example
    prompt_cut: int
    answer_cut: int


def encode(
    record: Record,
    tokenizer: "Tokenizer",
    template: Template,
    *,
    max_length: int,
    labels: Sequence[str] = (),
    all_answers: bool = False,
) -> Encoded:
    """Tokenise a record to at most `max_length` ids; `all_answers` of a conversation are trained.

    If they do not fit, the prompt loses its middle: a begin-of-text token, a quarter of what
    remains from the beginning and three quarters from the end are kept. The answer is cut only
    where it does not fit with nothing but one prompt token before it; `answer_cut` tells.
    """
    if max_length < 2:
        raise DataError(f"max_length={max_length}, but prompt and answer need at least 2 tokens")
    if isinstance(record, LabeledText):
        return _encode_labelled(record, tokenizer, max_length, labels)
    opening, prompt, answers = _parts(record, tokenizer, template)
    room = max_length - max(1, len(opening))
    # Each option stands behind the same prompt, so the longest of them has to fit as well.
    kept = [answer.ids[:room] for answer in answers]
    left = max_length - len(opening) - max(map(len, kept))
    rest = _cut_middle(prompt, left)
    right, *others = answers
    earlier: frozenset[int] = frozenset()
    if all_answers and isinstance(record, Chat):
        earlier = earlier_positions(record, opening + prompt, tokenizer)
    whole = tuple(range(len(opening), len(opening) + len(prompt)))
    example = Example(
        ids=(*opening, *rest, *kept[0]),
        answer_start=len(opening) + len(rest),
        answer=right.text,
        options=tuple(answer.text for answer in others),
        option_ids=tuple(kept[1:]),
        earlier=tuple(
            now for now, was in enumerate(_cut_middle(whole, left), len(opening)) if was in earlier
        ),
    )
    return Encoded(example, len(prompt) - len(rest), max(0, len(right.ids) - 1 - room))


def encode_prompt(
    record: Record, tokenizer: "Tokenizer", template: Template, *, max_length: int
) -> tuple[int, ...]:
    """The ids to generate from: those of `encode` before the answer, if an answer takes no room."""
    if isinstance(record, LabeledText):
        raise DataError("a record with a label is classified, no text is generated for it")
    if isinstance(record, Chat):
        opening, prompt = opened(ids_of(asked(record, tokenizer), tokenizer), tokenizer)
    else:
        opening, prompt = _prompt(record, tokenizer, template)
    return (*opening, *_cut_middle(prompt, max_length - len(opening)))


def cut_prompt(ids: Sequence[int], tokenizer: "Tokenizer", room: int) -> tuple[int, ...]:
    """A prompt's ids without so much of their middle that at most `room` of them are left.

    The same as `encode_prompt` with that `max_length`; cutting twice is cutting once.
    """
    if len(ids) <= room:
        return tuple(ids)
    opening, rest = opened(tuple(ids), tokenizer)
    return (*opening, *_cut_middle(rest, room - len(opening)))


def masked_example(example: Example, tokenizer: "Tokenizer") -> tuple[str, str]:
    """An example as text again: the part without loss, and the part the loss is on.

    Of a classifier's example the second part is the label.
    """
    prompt = _decode(example.prompt_ids, tokenizer)
    if example.label is not None:
        return prompt, example.answer
    return prompt, _decode(example.ids[example.answer_start :], tokenizer)


def opening_ids(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """What this tokenizer puts before every text: mostly a begin-of-text token or nothing."""
    plain = ids_of("a", tokenizer)
    full = [int(i) for i in tokenizer("a").input_ids]
    opening = next(
        (full[:at] for at in range(len(full)) if tuple(full[at : at + len(plain)]) == plain), []
    )
    bos = tokenizer.bos_token_id
    if bos is not None and getattr(tokenizer, "add_bos_token", False) and bos not in opening:
        opening.insert(0, int(bos))
    return tuple(opening)


def _encode_labelled(
    record: LabeledText, tokenizer: "Tokenizer", max_length: int, labels: Sequence[str]
) -> Encoded:
    if record.answer not in labels:
        raise DataError(f"label {record.answer!r} is none of {', '.join(labels) or 'no labels'}")
    whole = kept = tokenizer(record.text, record.pair, verbose=False)
    if len(whole.input_ids) > max_length:
        kept = tokenizer(record.text, record.pair, truncation=True, max_length=max_length)
    ids = tuple(int(i) for i in kept.input_ids)
    example = Example(
        ids=ids,
        answer_start=len(ids),
        answer=record.answer,
        options=tuple(labels),
        label=labels.index(record.answer),
        segments=tuple(int(i) for i in kept.get("token_type_ids", ())),
    )
    return Encoded(example, len(whole.input_ids) - len(ids), 0)


def _parts(
    record: Instruction | Completion | Chat, tokenizer: "Tokenizer", template: Template
) -> tuple[tuple[int, ...], tuple[int, ...], list[Answer]]:
    """What opens the text, never cut, the rest of the prompt, and the answer and its options."""
    if not isinstance(record, Chat):
        opening, prompt = _prompt(record, tokenizer, template)
        texts = [record.answer, *record.options]
        return opening, prompt, [plain_answer(text, tokenizer) for text in texts]
    prompt_text, behind = asked_and_answered(record, tokenizer)
    ids = ids_of(prompt_text, tokenizer)
    answers = [rendered_answer(record.answer, (prompt_text, behind), ids, tokenizer)]
    for option in record.options:
        other = replace(record, answer=option, whole="")
        if record.whole:
            messages = [*record.messages[:-1], {"role": "assistant", "content": option}]
            whole = {"messages": messages, "tools": record.tools}
            other = replace(other, whole=json.dumps(whole, ensure_ascii=False))
        both = asked_and_answered(other, tokenizer)
        answers.append(rendered_answer(option, both, ids, tokenizer))
    return *opened(ids, tokenizer), answers


def _prompt(
    record: Instruction | Completion, tokenizer: "Tokenizer", template: Template
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What opens the text, never cut, and the rest of the prompt."""
    text = template.render(record) if isinstance(record, Instruction) else record.prompt
    opening, ids = opening_ids(tokenizer), ids_of(text, tokenizer)
    # A text that was made for this model may bring its begin of text along.
    return opening, ids[len(opening) :] if ids[: len(opening)] == opening else ids


def opened(ids: tuple[int, ...], tokenizer: "Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt's ids as what opens them, which is never cut, and the rest."""
    opening = opening_ids(tokenizer)
    begins = len(opening) if ids[: len(opening)] == opening else 0
    if not begins and ids[:1] == (tokenizer.bos_token_id,):
        begins = 1
    return ids[:begins], ids[begins:]


def _cut_middle(ids: tuple[int, ...], room: int) -> tuple[int, ...]:
    if len(ids) <= room:
        return ids
    head = room // 4
    return ids[:head] + ids[len(ids) - (room - head) :]


def _decode(ids: Sequence[int], tokenizer: "Tokenizer") -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text
