"""What a server does for others while one request keeps it busy."""

import asyncio
import threading

import pytest
from bases import base_of

from fedalt.serving import http
from fedalt.serving.batch import Adapters
from fedalt.serving.engine import Engine
from fedalt.serving.errors import ApiError
from fedalt.serving.models import Model, Models
from fedalt.serving.schema import TextAsked
from fedalt.serving.settings import ServeSettings


def test_others_are_answered_while_a_long_prompt_becomes_tokens(monkeypatch):
    others = threading.Event()

    def long(*_):
        raise ApiError(400, "answered" if others.wait(10) else "nobody else was", "test")

    monkeypatch.setattr(http, "_prompt", long)
    base, model = base_of(), Model(Adapters(None, None, None), "prompt", None)
    engine = Engine(base, rows=1, queue=1)
    service = http.Service(Models(base, 10, {"a": model}), engine, ServeSettings())

    async def ask():
        asyncio.get_running_loop().call_later(0.1, others.set)
        await service.begin(TextAsked(model="a", prompt="a" * 10**6))

    with pytest.raises(ApiError, match="answered"):
        asyncio.run(ask())


def test_prompts_that_are_not_tokens_yet_wait_in_a_queue_too(monkeypatch):
    free = threading.Event()

    def long(*_):
        free.wait(10)
        raise ApiError(400, "its turn", "test")

    monkeypatch.setattr(http, "_prompt", long)
    base, model = base_of(), Model(Adapters(None, None, None), "prompt", None)
    engine, settings = Engine(base, rows=1, queue=1), ServeSettings(queue=1, seconds=0.5)
    service = http.Service(Models(base, 10, {"a": model}), engine, settings)

    async def ask_three():
        asked = (service.begin(TextAsked(model="a", prompt="a")) for _ in range(3))
        ends = await asyncio.gather(*asked, return_exceptions=True)
        free.set()
        return [end.status for end in ends]

    # One becomes tokens and one waits, both for longer than a request may take.
    assert asyncio.run(ask_three()) == [503, 503, 429]
    assert service.encoding == 0
