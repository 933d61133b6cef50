"""The forms of one record of client data, and how a JSON object becomes one of them."""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fedalt.core.foreign import shown
from fedalt.core.settings import DataSettings
from fedalt.data.conversations import Chat as Chat
from fedalt.data.conversations import Turn as Turn
from fedalt.data.conversations import parse_conversation
from fedalt.data.errors import DataError as DataError
from fedalt.data.errors import as_text, described
from fedalt.data.examples import Kind

SHOWN_PROBLEMS = 20

# Per form, the fields without which it is not this form; names in one group stand for each other.
_FORMS = {
    "instruction": (("instruction",), ("output", "response")),
    "prompt": (("prompt",), ("completion",)),
    "messages": (("messages",),),
    "label": (("text", "sentence1"), ("label",)),
}
_NAMES = frozenset(name for form in _FORMS.values() for group in form for name in group)
_WANTED = "instruction/output, prompt/completion, messages, text/label or sentence1/sentence2/label"


class Problems:
    """Collects what is wrong in one place, so that one error tells all of it.

    Only the first few texts are kept: a broken file of a million lines costs no memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._texts: list[str] = []

    def add(self, place: str, text: str) -> None:
        """Note a problem at a place, such as "a.train.jsonl:3"."""
        self.count += 1
        if len(self._texts) < SHOWN_PROBLEMS:
            self._texts.append(shown(f"{place}: {text}"))

    def raise_if_any(self) -> None:
        """End with one error that lists the problems so far."""
        if not self.count:
            return
        more = self.count - len(self._texts)
        lines = [*self._texts, f"and {more} more"] if more else self._texts
        if len(lines) == 1:
            raise DataError(f"{self.path}: {lines[0]}")
        raise DataError(f"{self.count} problems in {self.path}:\n  " + "\n  ".join(lines))


@dataclass(frozen=True)
class Instruction:
    """An instruction, an input it is about (may be empty) and the answer; goes through a template.

    `options` are the answers to choose from; empty for free text.
    """

    instruction: str
    input: str
    answer: str
    options: tuple[str, ...] = ()
    kind: ClassVar[Kind] = "generate"

    @property
    def question(self) -> str:
        """All that comes before the answer."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Completion:
    """A finished prompt and what follows it; no template is applied."""

    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    kind: ClassVar[Kind] = "generate"

    @property
    def question(self) -> str:
        """All that comes before the answer."""
        return self.prompt


@dataclass(frozen=True)
class LabeledText:
    """A text, or a pair of texts, and the name of its label."""

    text: str
    pair: str | None
    answer: str
    kind: ClassVar[Kind] = "classify"

    @property
    def question(self) -> str:
        """All that comes before the answer."""
        return self.text if self.pair is None else f"{self.text}\n\n{self.pair}"

    @property
    def options(self) -> tuple[str, ...]:
        """Always empty: the labels belong to the folder, not to the record."""
        return ()


Record = Instruction | Completion | Chat | LabeledText


def normalised(text: str) -> str:
    """The text without differences in case, white space, and how Unicode composes accents."""
    folded = unicodedata.normalize("NFC", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def question_key(record: Record) -> int:
    """64 bits that are equal for equal questions, apart from case and white space."""
    return _digest(normalised(record.question))


def record_key(record: Record) -> int:
    """64 bits that are equal for equal question and answer, apart from case and white space."""
    return _digest(f"{normalised(record.question)}\0{normalised(record.answer)}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Columns:
    """What the columns of client data are called where they have names of their own.

    `client` names the client in a file of several clients' records. `prompt` and `answer` take the
    place of `instruction` and `output`.
    """

    client: str | None = None
    prompt: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.answer is None):
            raise DataError("prompt_column and answer_column belong together: give both or none")

    def renamed(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        """The fields under the names that records have. Raises DataError for a missing one."""
        if self.prompt is None or self.answer is None:
            return fields
        for name in (self.prompt, self.answer):
            if name not in fields:
                known = ", ".join(map(repr, list(fields)[:8])) or "none"
                raise DataError(f"no column {name!r}; the columns are {known}")
        rest = {k: v for k, v in fields.items() if k not in (self.prompt, self.answer, *_NAMES)}
        return {"instruction": fields[self.prompt], "output": fields[self.answer], **rest}

    @staticmethod
    def of(data: DataSettings) -> "Columns":
        """Those that a run's settings name."""
        return Columns(data.client_column, data.prompt_column, data.answer_column)


def parse_record(value: object, columns: Columns = Columns()) -> Record:
    """Make a record of a decoded JSON object; a DataError names the field and what was expected.

    Fields that belong to no form are left aside.
    """
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object with {_WANTED}, got {described(value)}")
    fields = columns.renamed(value)
    match _form(fields):
        case "instruction":
            instruction, context = _filled(fields, "instruction"), _input(fields)
            answer = _text(fields, "output" if "output" in fields else "response")
            options = _options(fields, context if listed_options(context) else instruction, answer)
            return Instruction(instruction, context, answer, options)
        case "prompt":
            prompt, answer = _filled(fields, "prompt"), _text(fields, "completion")
            return Completion(prompt, answer, _options(fields, prompt, answer))
        case "messages":
            chat = parse_conversation(fields)
            return replace(chat, options=_options(fields, chat.turns[-1].content, chat.answer))
        case _:
            first = "text" if "text" in fields else "sentence1"
            pair = None
            if first == "sentence1" and fields.get("sentence2") not in (None, ""):
                pair = _text(fields, "sentence2")
            return LabeledText(_filled(fields, first), pair, _label(fields))


def _form(fields: Mapping[str, object]) -> str:
    """Which of the forms has all its fields here; extra fields do no harm."""
    complete = [
        form
        for form, groups in _FORMS.items()
        if all(any(name in fields for name in group) for group in groups)
    ]
    if len(complete) > 1:
        raise DataError(f"the fields are those of two record forms, {' and '.join(complete)}")
    if complete:
        for group in _FORMS[complete[0]]:
            given = [name for name in group if name in fields]
            if any(fields[name] != fields[given[0]] for name in given[1:]):  # NaN differs from NaN
                raise DataError(f"fields {' and '.join(map(repr, given))} differ: keep one")
        return complete[0]
    for first, *others in _FORMS.values():
        present = [name for name in first if name in fields]
        missing = [group[0] for group in others if not any(name in fields for name in group)]
        if present and missing:
            hint = (
                "; a text to learn, without a label, is a completion: give prompt and completion"
                if present == ["text"]
                else ""
            )
            raise DataError(f"field {missing[0]!r} is missing beside {present[0]!r}{hint}")
    names = ", ".join(sorted(fields)[:8]) or "none"
    raise DataError(f"no known record form; expected the fields {_WANTED}, got {names}")


def _text(fields: Mapping[str, object], name: str) -> str:
    return as_text(fields[name], f"field {name!r}")


def _filled(fields: Mapping[str, object], name: str) -> str:
    text = _text(fields, name)
    if not text.strip():
        raise DataError(f"field {name!r} is empty; expected text")
    return text


def _input(fields: Mapping[str, object]) -> str:
    """The text the instruction is about; Dolly calls it context."""
    texts = {_text(fields, name) for name in ("input", "context") if fields.get(name) is not None}
    texts.discard("")
    if len(texts) > 1:
        raise DataError("fields 'input' and 'context' differ: keep one")
    return texts.pop() if texts else ""


def _label(fields: Mapping[str, object]) -> str:
    label = fields["label"]
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"field 'label': expected a name or a whole number, got {described(label)}")
    return _text(fields, "label").strip()


def _options(fields: Mapping[str, object], question: str, answer: str) -> tuple[str, ...]:
    """The field `options`, or else the OPTIONS list at the end of the question.

    White space around the answer, such as a completion's first space, is put around every option:
    a wrong one is then no likelier or less likely for the lack of it.
    """
    options, text = _listed(fields, question), answer.strip()
    if text == answer or text not in options:
        return options
    before, after = answer.split(text, 1)
    return tuple(f"{before}{option}{after}" for option in options)


def _listed(fields: Mapping[str, object], question: str) -> tuple[str, ...]:
    value = fields.get("options")
    if value is None or value == []:
        return listed_options(question)
    if not isinstance(value, list):
        raise DataError(f"field 'options': expected a list of texts, got {described(value)}")
    options = [
        as_text(option, f"field 'options[{index}]'").strip() for index, option in enumerate(value)
    ]
    if len(set(options)) != len(options) or len(options) < 2 or not all(options):
        raise DataError("field 'options': expected at least two texts, all different, none empty")
    return tuple(options)


def listed_options(question: str) -> tuple[str, ...]:
    """The texts of a list "OPTIONS:", "- a", "- b" that ends the question; () if there is none."""
    head, word, tail = question.rpartition("OPTIONS:")
    if not word or (head and not head.endswith("\n")) or tail.lstrip(" \t\r")[:1] != "\n":
        return ()
    lines = [line.strip() for line in tail.strip().split("\n")]
    if not all(line.startswith("- ") for line in lines):
        return ()
    options = tuple(dict.fromkeys(line[2:].strip() for line in lines))
    return options if len(options) > 1 else ()
