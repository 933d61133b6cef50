"""The paths of OpenAI's API that `fedalt serve` answers, over one engine."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fedalt.data.records import DataError
from fedalt.models.errors import ModelError
from fedalt.serving import engine as engines
from fedalt.serving.answer import FAILED, Answer, Text, Written
from fedalt.serving.engine import Engine
from fedalt.serving.errors import ApiError, told
from fedalt.serving.guard import Guard
from fedalt.serving.metrics import exposition
from fedalt.serving.models import Model, Models
from fedalt.serving.replies import ChatForm, Form, stream, whole
from fedalt.serving.schema import ChatAsked, TextAsked
from fedalt.serving.settings import ServeSettings


@dataclass
class Service:
    """What the paths share."""

    models: Models
    engine: Engine
    settings: ServeSettings
    began: int = field(default_factory=lambda: int(time.time()))
    # One: not all tokenizers bear two calls at once.
    encoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoder"))
    encoding: int = 0  # requests whose prompts are not tokens yet

    def model(self, name: str) -> Model:
        """A model by its name. Raises ApiError."""
        try:
            return self.models.by_name[name]
        except KeyError:
            raise ApiError(
                404,
                f"there is no model {name[:80]!r}; GET /v1/models lists them",
                "model_not_found",
                "model",
            ) from None

    def card(self, name: str) -> dict[str, Any]:
        """What `/v1/models` tells of a model."""
        return {"id": name, "object": "model", "created": self.began, "owned_by": "fedalt"}

    async def begin(self, asked: ChatAsked | TextAsked) -> Answer:
        """Put a request to the engine. Raises ApiError."""
        deadline = time.monotonic() + self.settings.seconds
        if (name := asked.unsupported()) is not None:
            raise ApiError(400, f"{name}: this server cannot do that", "unsupported", name)
        model, base = self.model(asked.model), self.models.base
        chat = isinstance(asked, ChatAsked)
        queue: Written = asyncio.Queue()
        loop = asyncio.get_running_loop()
        if self.encoding > self.settings.queue:
            raise _full()
        self.encoding += 1
        try:
            async with asyncio.timeout(self.settings.seconds):
                # A megabyte takes seconds, in which everybody else is answered as well.
                prompt = await loop.run_in_executor(
                    self.encoder, _prompt, model, self.models, asked
                )
        except TimeoutError:
            raise ApiError(*FAILED["late"]) from None
        finally:
            self.encoding -= 1
        request = engines.Request(
            model.adapters,
            prompt,
            self._most(asked, len(prompt)),
            lambda token, end: _put(loop, queue, (token, end)),
            asked.temperature or 0.0,
            1.0 if asked.top_p is None else asked.top_p,
            asked.seed,
            deadline,
        )
        try:
            self.engine.submit(request)
        except engines.QueueFullError:
            raise _full() from None
        except engines.ClosedError:
            raise ApiError(503, "the server is shutting down", "shutting_down") from None
        return Answer(request, Text(base, asked.stop or [], stripped=chat), queue)

    def _most(self, asked: ChatAsked | TextAsked, read: int) -> int:
        """The longest answer, in tokens. Raises ApiError where prompt and answer have no room."""
        limit, reads = self.settings.max_tokens, self.models.base.positions
        positions = min(reads, self.engine.longest)
        held = "the model reads" if positions == reads else "the memory of this server holds"
        if asked.most is None:
            most = min(self.models.max_new_tokens, limit, positions - read)
        elif asked.most > limit:
            raise ApiError(
                400,
                f"max_tokens: {asked.most}, but this server writes at most {limit}",
                "invalid_value",
                "max_tokens",
            )
        else:
            most = asked.most
        if most < 1 or read + most > positions:
            raise ApiError(
                400,
                f"the prompt has {read} tokens and the answer may have {max(most, 1)}, but {held} "
                f"at most {positions}",
                "context_length_exceeded",
                "messages" if isinstance(asked, ChatAsked) else "prompt",
            )
        return most


def _full() -> ApiError:
    return ApiError(429, "too many requests wait already; try again later", "queue_full")


def _prompt(model: Model, models: Models, asked: ChatAsked | TextAsked) -> tuple[int, ...]:
    """The ids to go on from. Raises ApiError."""
    param = "messages" if isinstance(asked, ChatAsked) else "prompt"
    try:
        if isinstance(asked, ChatAsked):
            turns = [message.turn for message in asked.messages]
            empty = not turns[-1].content.strip()
            ids = () if empty else model.chat(models.base, turns)
        else:
            ids = model.text(models.base, asked.prompt) if asked.prompt else ()
    except (DataError, ModelError) as error:
        raise ApiError(400, f"{param}: {error}", "invalid_value", param) from None
    if not ids:
        raise ApiError(400, f"{param}: the prompt is empty", "empty_prompt", param)
    return ids


def _put(loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Any]", item: Any) -> None:
    """From the engine's thread; nobody listens any more once the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, item)


async def _answered(
    service: Service, asked: ChatAsked | TextAsked, request: Request, form: Form
) -> Response:
    answer = await service.begin(asked)
    if asked.stream:
        return stream(answer, form, usage=asked.counts_usage)
    return await whole(answer, form, request)


def app_of(service: Service, token: str | None) -> Guard:
    """The application."""
    app = FastAPI(title="fedalt", openapi_url=None)
    for error in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error, told)
    guard = Guard(app, token, service.settings)
    get = partial(app.api_route, methods=["GET", "HEAD"])

    @get("/health")
    async def health() -> Response:
        return Response(
            "ok\n" if service.engine.alive else "failed\n", 200 if service.engine.alive else 503
        )

    @get("/metrics")
    async def metrics() -> Response:
        return Response(
            exposition(service.engine, guard.counts), media_type="text/plain; version=0.0.4"
        )

    @get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card(name) for name in service.models.by_name]}

    @get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.model(name)
        return service.card(name)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        return await _answered(service, asked, request, ChatForm(asked.model))

    @app.post("/v1/completions")
    async def complete(asked: TextAsked, request: Request) -> Response:
        return await _answered(service, asked, request, Form(asked.model))

    return guard
