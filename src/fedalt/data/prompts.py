"""From a record to token ids: the template, the cut to a maximal length, where the answer begins.

Prompt and answer are tokenised apart, so that the prompt's ids are the same whether an answer
follows or is to be generated. The loss is on the answer and the end-of-text token behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from fedalt.data.encodings import EncodingError, decoded
from fedalt.data.examples import Example
from fedalt.data.records import Chat, Completion, DataError, Instruction, Labelled, Record

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


def read_template(file: Path) -> Template:
    """A template from a text file, taken as it is, a line end at its end included."""
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
) -> Encoded:
    """Tokenise a record to at most `max_length` ids.

    If they do not fit, the prompt loses its middle: a begin-of-text token, a quarter of what
    remains from the beginning and three quarters from the end are kept. The answer is cut only
    where it does not fit with nothing but one prompt token before it; `answer_cut` tells.
    """
    if max_length < 2:
        raise DataError(f"max_length={max_length}, but prompt and answer need at least 2 tokens")
    if isinstance(record, Labelled):
        return _encode_labelled(record, tokenizer, max_length, labels)
    opening, prompt = _prompt(record, tokenizer, template)
    answer = encode_answer(record.answer, tokenizer)
    room = max_length - max(1, len(opening))
    kept = answer[:room]
    rest = _cut_middle(prompt, max_length - len(opening) - len(kept))
    example = Example(
        ids=(*opening, *rest, *kept),
        answer_start=len(opening) + len(rest),
        answer=record.answer,
        options=record.options,
    )
    return Encoded(example, len(prompt) - len(rest), max(0, len(answer) - 1 - room))


def encode_prompt(
    record: Record, tokenizer: "Tokenizer", template: Template, *, max_length: int
) -> tuple[int, ...]:
    """The ids to generate from: those of `encode` before the answer, if an answer takes no room."""
    if isinstance(record, Labelled):
        raise DataError("a record with a label is classified, no text is generated for it")
    opening, prompt = _prompt(record, tokenizer, template)
    return (*opening, *_cut_middle(prompt, max_length - len(opening)))


def encode_answer(text: str, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """An answer's ids as they follow any prompt, the end-of-text token included.

    Also the ids of an option: its likelihood is compared with that of the others.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token (eos_token), answers need one")
    return (*_ids(text, tokenizer), int(tokenizer.eos_token_id))


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
    plain = _ids("a", tokenizer)
    full = [int(i) for i in tokenizer("a").input_ids]
    opening = next(
        (full[:at] for at in range(len(full)) if tuple(full[at : at + len(plain)]) == plain), []
    )
    bos = tokenizer.bos_token_id
    if bos is not None and getattr(tokenizer, "add_bos_token", False) and bos not in opening:
        opening.insert(0, int(bos))
    return tuple(opening)


def _encode_labelled(
    record: Labelled, tokenizer: "Tokenizer", max_length: int, labels: Sequence[str]
) -> Encoded:
    if record.answer not in labels:
        raise DataError(f"label {record.answer!r} is none of {', '.join(labels) or 'no labels'}")
    full = tokenizer(record.text, record.pair, verbose=False).input_ids
    ids = full
    if len(full) > max_length:
        ids = tokenizer(record.text, record.pair, truncation=True, max_length=max_length).input_ids
    example = Example(
        ids=tuple(int(i) for i in ids),
        answer_start=len(ids),
        answer=record.answer,
        options=tuple(labels),
        label=labels.index(record.answer),
    )
    return Encoded(example, len(full) - len(ids), 0)


def _prompt(
    record: Instruction | Completion | Chat, tokenizer: "Tokenizer", template: Template
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What opens the text, never cut, and the rest of the prompt."""
    if isinstance(record, Chat):
        ids = _chat_ids(record, tokenizer)
        begins = ids[:1] == (tokenizer.bos_token_id,)
        return (ids[:1], ids[1:]) if begins else ((), ids)
    text = template.render(record) if isinstance(record, Instruction) else record.prompt
    return opening_ids(tokenizer), _ids(text, tokenizer)


def _chat_ids(record: Chat, tokenizer: "Tokenizer") -> tuple[int, ...]:
    if not tokenizer.chat_template:
        raise DataError(
            "a record has messages, but the tokenizer has no chat template; take a model with one, "
            "or records with instruction/output or prompt/completion"
        )
    turns = [turn._asdict() for turn in record.turns]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # the template is the model's own program and may raise anything
        raise DataError(f"the tokenizer's chat template refuses a conversation: {error}") from error
    return _ids(text, tokenizer)


def _cut_middle(ids: tuple[int, ...], room: int) -> tuple[int, ...]:
    if len(ids) <= room:
        return ids
    head = room // 4
    return ids[:head] + ids[len(ids) - (room - head) :]


def _ids(text: str, tokenizer: "Tokenizer") -> tuple[int, ...]:
    return tuple(int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _decode(ids: Sequence[int], tokenizer: "Tokenizer") -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text
