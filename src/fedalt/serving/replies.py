"""Answers in the forms of OpenAI's API: whole, or in pieces as they are written."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from fedalt.serving.answer import Answer
from fedalt.serving.errors import ApiError


@dataclass
class Form:
    """What an answer to `/v1/completions` looks like."""

    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    prefix: ClassVar[str] = "cmpl"
    whole_kind: ClassVar[str] = "text_completion"
    piece_kind: ClassVar[str] = "text_completion"

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """All of it."""
        choice = {**self.all_of(text), "finish_reason": answer.end}
        return {**self._about(self.whole_kind, choice), "usage": answer.usage}

    def piece(self, content: dict[str, Any], end: str | None) -> dict[str, Any]:
        """A part of it."""
        return self._about(self.piece_kind, {**content, "finish_reason": end})

    def usage(self, answer: Answer) -> dict[str, Any]:
        """The numbers of tokens, behind the last piece."""
        return {**self._about(self.piece_kind, None), "usage": answer.usage}

    def all_of(self, text: str) -> dict[str, Any]:
        """A text as the whole answer."""
        return {"text": text}

    def part_of(self, text: str, *, first: bool) -> dict[str, Any]:
        """A text as a part of the answer."""
        del first
        return {"text": text}

    def _about(self, kind: str, choice: dict[str, Any] | None) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, "logprobs": None, **choice}]
        about = {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created}
        return {**about, "model": self.model, "choices": choices}


@dataclass
class ChatForm(Form):
    """What an answer to `/v1/chat/completions` looks like."""

    prefix: ClassVar[str] = "chatcmpl"
    whole_kind: ClassVar[str] = "chat.completion"
    piece_kind: ClassVar[str] = "chat.completion.chunk"

    def all_of(self, text: str) -> dict[str, Any]:
        """See `Form`."""
        return {"message": {"role": "assistant", "content": text}}

    def part_of(self, text: str, *, first: bool) -> dict[str, Any]:
        """See `Form`."""
        return {"delta": {**({"role": "assistant"} if first else {}), "content": text}}


async def whole(answer: Answer, form: Form, request: Request) -> Response:
    """The answer once it is complete; nothing is written on for a client that has hung up."""
    text = asyncio.ensure_future(_joined(answer))
    hung_up = asyncio.ensure_future(request.receive())  # what comes behind a request is its end
    try:
        await asyncio.wait({text, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(form.whole(text.result(), answer))
    finally:
        answer.request.gone = True
        for task in (text, hung_up):
            task.cancel()


async def _joined(answer: Answer) -> str:
    return "".join([piece async for piece in answer.pieces()])


def stream(answer: Answer, form: Form, *, usage: bool) -> Response:
    """The answer as server-sent events."""
    return StreamingResponse(_events(answer, form, usage=usage), media_type="text/event-stream")


async def _events(answer: Answer, form: Form, *, usage: bool) -> AsyncIterator[str]:
    first = True
    try:
        async for text in answer.pieces():
            if text or first or answer.end:
                content = form.part_of(text, first=first)
                yield _event(form.piece(content, answer.end or None))
                first = False
        if usage:
            yield _event(form.usage(answer))
    except ApiError as error:  # the status is sent already
        yield _event({"error": error.body()})
    finally:
        answer.request.gone = True
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
