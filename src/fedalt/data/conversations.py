"""Conversations: messages with roles, calls of tools and their results, the tools on offer.

Other notations are brought to the one that chat templates read: `function_call` and `functions`
become `tool_calls` and `tools`, arguments in JSON become objects, parts of text become one text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from fedalt.data.errors import DataError, as_text, described
from fedalt.data.examples import Kind
from fedalt.data.json_text import RepeatedKeyError, parsed

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES: Final = {"function": "tool"}  # as results were called before there were tools

Message = dict[str, Any]


class Turn(NamedTuple):
    """One message of a conversation, as text: what it calls is part of `content`."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation up to the assistant's last message, which is the answer.

    `turns` and `answer` are its texts. `whole` is JSON with `messages` and `tools`, for a
    conversation that is more than that: with calls of tools, reasoning or names.
    """

    turns: tuple[Turn, ...]
    answer: str
    options: tuple[str, ...] = ()
    whole: str = ""
    kind: ClassVar[Kind] = "generate"

    @property
    def question(self) -> str:
        """All that comes before the answer."""
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.turns)

    @property
    def messages(self) -> list[Message]:
        """What a chat template reads, the answer last."""
        if self.whole:
            messages: list[Message] = json.loads(self.whole)["messages"]
            return messages
        return [turn._asdict() for turn in (*self.turns, Turn("assistant", self.answer))]

    @property
    def tools(self) -> list[Message]:
        """The tools that the assistant may call, as JSON schemas; mostly none."""
        tools: list[Message] = json.loads(self.whole)["tools"] if self.whole else []
        return tools


def parse_conversation(fields: Mapping[str, object]) -> Chat:
    """The fields `messages` and, where given, `tools` (or `functions`), still without options.

    Raises DataError for what no chat template could read, and for an end that is no answer.
    """
    messages = _messages(fields["messages"])
    tools = _tools(fields)
    turns = [Turn(message["role"], _text_of(message)) for message in messages]
    whole = ""
    if tools or any(message.keys() != {"role", "content"} for message in messages):
        whole = json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False)
        as_text(whole, "field 'messages'")
    return Chat(tuple(turns[:-1]), turns[-1].content, whole=whole)


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(
            "field 'messages': expected a list of at least two messages, a question and its "
            f"answer, got {described(value)}"
        )
    messages = [_message(item, f"field 'messages[{at}]'") for at, item in enumerate(value)]
    if (role := messages[-1]["role"]) != "assistant":
        raise DataError(f"field 'messages': the last role is {role!r}; expected 'assistant'")
    return messages


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict) or "role" not in value:
        raise DataError(f"{place}: expected an object with role and content")
    given = {key: field for key, field in value.items() if field not in (None, [], {})}
    role = value["role"]
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"{place}: role {described(value['role'])} is none of {', '.join(ROLES)}")
    message: Message = {"role": role}
    if "content" in given:
        message["content"] = _content(given["content"], f"{place}.content")
    calls = _calls(given, place)
    if calls and role != "assistant":
        raise DataError(f"{place}: a message of role {role!r} calls a tool; only 'assistant' does")
    if not calls and "content" not in given:
        if "content" in value:
            raise DataError(f"{place}.content: expected text, got {described(value['content'])}")
        raise DataError(f"{place}: expected an object with role and content")
    for key in given.keys() - {"role", "content", "tool_calls", "function_call"}:
        if given[key] != "":
            message[key] = given[key]
    if calls:
        message["tool_calls"] = calls
    return dict(sorted(message.items()))  # equal messages, equal text


def _content(value: object, place: str) -> str:
    """A text, or a list of parts that are all texts."""
    if not isinstance(value, list):
        return as_text(value, place)
    texts = []
    for at, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            got = f"a part of type {kind!r}" if kind else described(part)
            raise DataError(f"{place}[{at}]: expected a part of type 'text', got {got}")
        texts.append(as_text(part.get("text"), f"{place}[{at}].text"))
    return "".join(texts)


def _calls(given: Mapping[str, Any], place: str) -> list[Message]:
    if "function_call" in given:
        if "tool_calls" in given:
            raise DataError(f"{place}: has both 'tool_calls' and 'function_call': keep one")
        return [_call({"function": given["function_call"]}, f"{place}.function_call")]
    calls = given.get("tool_calls", [])
    if not isinstance(calls, list):
        raise DataError(f"{place}.tool_calls: expected a list of calls, got {described(calls)}")
    return [_call(call, f"{place}.tool_calls[{at}]") for at, call in enumerate(calls)]


def _call(value: object, place: str) -> Message:
    wanted = "expected a function with a name and arguments"
    call: Message = dict(value) if isinstance(value, dict) else {}
    if "function" not in call:  # some leave out the wrapping
        inner = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        call["function"] = inner
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: {wanted}, got {described(value)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as it comes over the wire; templates want the object
        try:
            arguments = parsed(arguments or "{}")
        except RepeatedKeyError as error:
            raise DataError(f"{place}: in its arguments {error}") from None
        except (ValueError, RecursionError):
            raise DataError(f"{place}: its arguments are no valid JSON") from None
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: expected an object as arguments, got {described(arguments)}")
    call["function"] = {**function, "arguments": arguments}
    return {"type": "function", **call}


def _tools(fields: Mapping[str, object]) -> list[Message]:
    """The field `tools`, also as JSON text, or what was called `functions` before."""
    name = "tools" if fields.get("tools") else "functions"
    value = fields.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = parsed(value)
        except RepeatedKeyError as error:
            raise DataError(f"field {name!r}: {error}") from None
        except (ValueError, RecursionError):
            raise DataError(f"field {name!r}: expected a list of tools, got a text") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) and tool for tool in value):
        raise DataError(
            f"field {name!r}: expected a list of tools, each an object with its JSON schema, "
            f"got {described(value)}"
        )
    if name == "functions":
        return [{"type": "function", "function": tool} for tool in value]
    return value


def _text_of(message: Message) -> str:
    """A message's text, and behind it each call as JSON."""
    calls: Sequence[Message] = message.get("tool_calls", [])
    lines = [message.get("content", "")] + [
        json.dumps(
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
            ensure_ascii=False,
        )
        for call in calls
    ]
    return "\n".join(line for line in lines if line)
