"""Who may ask, and how much: what stands before all paths."""

import asyncio
import hmac
from collections import Counter
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedalt.serving.errors import ApiError
from fedalt.serving.settings import LOOPBACK, ServeSettings

_OPEN: Final = "/health"


class Guard:
    """Lets a request through to the application, or answers it. Counts answers by status.

    Without a token a server listens on this machine alone. There a page in a browser may ask it
    under a name of its own that leads here; so the request has to name this machine.
    """

    def __init__(self, app: ASGIApp, token: str | None, settings: ServeSettings) -> None:
        self._app, self._token, self._settings = app, token, settings
        self.counts: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counts[message["status"]] += 1
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._require_right(scope["path"], headers)
            async with asyncio.timeout(self._settings.seconds):
                body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, counting)
        except TimeoutError:
            late = ApiError(408, "the request did not come in time", "timeout")
            await late.response()(scope, receive, counting)
        else:
            await self._app(scope, _again(body, receive), counting)

    def _require_right(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1").rpartition("]")
            name = host[0].removeprefix("[") if host[1] else host[2].partition(":")[0]
            if name not in LOOPBACK:
                raise ApiError(421, "this server answers to the name of this machine", "bad_host")
        elif path != _OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                raise ApiError(
                    401,
                    "wrong or missing token: expected `Authorization: Bearer TOKEN`",
                    "invalid_api_key",
                )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """All that was sent; None for a client that hung up."""
        limit = self._settings.max_bytes
        too_large = ApiError(413, f"the request is larger than {limit} bytes", "request_too_large")
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > limit:
            raise too_large
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise too_large
        return body


def _again(body: bytes | None, receive: Receive) -> Receive:
    """What is received once more, and then what comes after it."""
    told = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return told.pop() if told else await receive()

    return next_message
