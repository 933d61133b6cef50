"""Conversations through a model's chat template: the prompt, the answer behind it, its end.

The template is the model's own program. What it renders is what is trained and asked; what it
would leave out of a conversation is an error, never dropped in silence.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from fedalt.data.conversations import Chat, Message
from fedalt.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Templates that tell the model what day it is are told this one, always: a prompt is then the same
# in training, when a run is resumed, and years later. Llama 3 itself falls back to this day.
TODAY: Final = datetime(2024, 7, 26)
_DAY: Final = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
_PROBE: Final = "qzxv"  # a text that no template writes by itself
_SHOWN: Final = 40  # characters of a text in an error


def asked(chat: Chat, tokenizer: "Tokenizer") -> str:
    """The prompt of a conversation, up to where the answer begins. Raises DataError."""
    return _render(chat.messages[:-1], chat.tools, tokenizer, ask=True)


def asked_and_answered(chat: Chat, tokenizer: "Tokenizer") -> tuple[str, str]:
    """The prompt, and all that the template writes behind it for the answer.

    Raises DataError for a template that refuses the conversation, leaves a part of it out, or does
    not go on where it asks.
    """
    _require_all_told(chat, tokenizer)
    prompt = asked(chat, tokenizer)
    whole = _render(chat.messages, chat.tools, tokenizer, ask=False)
    if not whole.startswith(prompt):
        same = next(
            (at for at, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]),
            min(len(prompt), len(whole)),
        )
        raise DataError(
            "the tokenizer's chat template does not continue its own prompt: after "
            f"{prompt[max(0, same - _SHOWN) : same]!r} it asks with "
            f"{prompt[same : same + _SHOWN]!r}, but with the answer it writes "
            f"{whole[same : same + _SHOWN]!r}; expected a conversation whose last message it "
            "appends to what comes before"
        )
    return prompt, whole[len(prompt) :]


def earlier_answers(chat: Chat, tokenizer: "Tokenizer") -> Iterator[tuple[str, str, str]]:
    """Each answer before the last: its place, the prompt before it, and what is written for it.

    Raises DataError for a template that writes an earlier turn otherwise than the last one, as some
    do with reasoning: what was written then would be trained, and is not what a model shall write.
    """
    prompt = asked(chat, tokenizer)
    for at, message in enumerate(chat.messages[:-1]):
        if message["role"] != "assistant":
            continue
        before = _render(chat.messages[:at], chat.tools, tokenizer, ask=True)
        whole = _render(chat.messages[: at + 1], chat.tools, tokenizer, ask=False)
        if not (whole.startswith(before) and prompt.startswith(before)):
            raise DataError(
                f"the tokenizer's chat template writes 'messages[{at}]' otherwise once the "
                "conversation goes on, so the answer there cannot be trained; expected "
                "--train-on last, or a conversation in pieces that each end with an answer"
            )
        yield f"messages[{at}]", before, whole[len(before) :]


def turn_end(tokenizer: "Tokenizer") -> int | None:
    """The token with which the chat template ends an answer; None where it writes none."""
    return _turn_end(tokenizer, json.dumps(tokenizer.chat_template))


def ends_of(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The tokens that end an answer, as the tokenizer tells: end of text, and of a chat's turn."""
    known = (tokenizer.eos_token_id, turn_end(tokenizer))
    return tuple(dict.fromkeys(int(token) for token in known if token is not None))


def special_ids(tokenizer: "Tokenizer") -> frozenset[int]:
    """Tokens that are no text: decoding for a reader leaves them out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(
        [*tokenizer.all_special_ids, *(at for at, token in added.items() if token.special)]
    )


@lru_cache(maxsize=8)
def _turn_end(tokenizer: "Tokenizer", _: str) -> int | None:
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        _, probe, behind = _render(turns, [], tokenizer, ask=False).rpartition(_PROBE)
    except DataError:
        return None
    ids = tokenizer(behind, add_special_tokens=False, verbose=False).input_ids if probe else []
    added = set(tokenizer.get_added_vocab().values())
    special = special_ids(tokenizer)
    ends = [at for at in ids if at in special] or [at for at in ids if at in added]
    return int(ends[0]) if ends else None


def _render(
    messages: Sequence[Message], tools: Sequence[Message], tokenizer: "Tokenizer", *, ask: bool
) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "a record has messages, but the tokenizer has no chat template; take a model with one, "
            "or records with instruction/output or prompt/completion"
        )
    try:
        return _rendered(messages, tools, tokenizer, ask=ask)
    except Exception as error:  # the template is the model's own program and may raise anything
        in_json = [_with_arguments_in_json(message) for message in messages]
        if in_json != list(messages):  # some templates want them so
            with suppress(Exception):
                return _rendered(in_json, tools, tokenizer, ask=ask)
        raise DataError(f"the tokenizer's chat template refuses a conversation: {error}") from error


def _rendered(
    messages: Sequence[Message], tools: Sequence[Message], tokenizer: "Tokenizer", *, ask: bool
) -> str:
    known: dict[str, Any] = {"tools": list(tools)} if tools else {}
    template = tokenizer.get_chat_template(None, known.get("tools"))
    if "strftime_now" in template:
        known["chat_template"] = with_a_fixed_day(template)
    text: str = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=ask, tokenize=False, **known
    )
    return text


def _with_arguments_in_json(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def days_in(template: str) -> dict[str, str]:
    """How a template asks what day it is, and the text that stands there instead."""
    return {call[0]: f'"{TODAY.strftime(call[2])}"' for call in _DAY.finditer(template)}


def with_a_fixed_day(template: str) -> str:
    """A template that tells TODAY, as transformers takes no other day but another template.

    Raises ValueError where the template's way to ask is not known.
    """
    for call, day in days_in(template).items():
        template = template.replace(call, day)
    if re.search(r"strftime_now\s*\(", template):
        raise ValueError("it tells what day it is, in a form that is not written out in it")
    return template


def _require_all_told(chat: Chat, tokenizer: "Tokenizer") -> None:
    """Raise DataError where the template leaves out what a conversation of this shape says."""
    messages, tools = chat.messages, chat.tools
    marks: dict[str, str] = {}

    def mark(place: str) -> str:
        return marks.setdefault(place, f"{_PROBE}{len(marks)}{_PROBE}")

    marked = [
        _marked(message, f"messages[{at}]", mark, last=at == len(messages) - 1)
        for at, message in enumerate(messages)
    ]
    marked_tools = [_marked_tool(tool, f"tools[{at}]", mark) for at, tool in enumerate(tools)]
    shape = json.dumps([marked, marked_tools, marks], sort_keys=True)
    if (left_out := _left_out(tokenizer, json.dumps(tokenizer.chat_template), shape)) is not None:
        raise DataError(
            f"the tokenizer's chat template leaves out field {left_out!r}; take it out of the "
            "record, or a model whose template writes it"
        )


def _marked(message: Message, place: str, mark: Any, *, last: bool) -> Message:
    """A message of the same shape, with a mark in the place of each text that has to be told."""
    marked = dict(message)
    # Plumbing: it tells nothing that the rest does not, and most templates leave it out. So does
    # what was thought before an earlier answer, which templates drop on purpose.
    required = {"name", "refusal"} - ({"name"} if message["role"] == "tool" else set())
    if last:
        required |= {"reasoning_content", "reasoning", "thinking"}
    for key, value in message.items():
        if key == "content":
            marked[key] = mark(f"{place}.{key}") if str(value).strip() else ""
        elif key == "tool_calls":
            marked[key] = [
                _marked_call(call, f"{place}.{key}[{at}]", mark) for at, call in enumerate(value)
            ]
        elif key in required and isinstance(value, str):
            marked[key] = mark(f"{place}.{key}")
        elif key not in ("role", "tool_call_id"):
            marked[key] = _PROBE if isinstance(value, str) else value
    return marked


def _marked_call(call: Message, place: str, mark: Any) -> Message:
    function = dict(call["function"])
    function["name"] = mark(f"{place}.function.name")
    if function["arguments"]:
        function["arguments"] = {"x": mark(f"{place}.function.arguments")}
    return {**call, "function": function}


def _marked_tool(tool: Message, place: str, mark: Any) -> Message:
    inner = tool.get("function")
    if isinstance(inner, dict) and "name" in inner:
        return {**tool, "function": {**inner, "name": mark(place)}}
    return {**tool, "name": mark(place)} if "name" in tool else tool


@lru_cache(maxsize=256)
def _left_out(tokenizer: "Tokenizer", _: str, shape: str) -> str | None:
    """The first place of a marked conversation whose mark the template does not write."""
    messages, tools, marks = json.loads(shape)
    try:
        text = _render(messages, tools, tokenizer, ask=False)
    except DataError:  # of the marks, or of the conversation: that shows when it is rendered itself
        return None
    return next((place for place, mark in marks.items() if mark not in text), None)
