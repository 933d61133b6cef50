"""What a federation's clients reach of Flower's server, and nothing else.

    python -m fedalt.flower.door ADDRESS INNER_PORT MOST_BYTES [CERTIFICATE KEY AUTHORITY]

Flower serves three interfaces at one port. Only one is for clients and asks for a key; over the
others anybody may start programs on the server and on its clients. So Flower listens on loopback,
and this process passes on from outside what belongs to clients. What it refuses it counts, and
prints once a minute: one line of JSON for each kind, so that strangers cannot fill the disk.

Where INNER_PORT is "ended", it tells whoever calls that the federation has ended.
"""

import asyncio
import json
import logging
import ssl
import sys
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from typing import Final

import httpx
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedalt.flower.records import CHUNK

CALLS: Final = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "pull-object",
    "push-object",
    "confirm-message-received",
)
_MOST: Final = 2 * CHUNK  # bytes of one request; Flower sends large arrays in pieces
_OBJECTS: Final = 8  # a message's own beside its arrays
_PASSED: Final = "flwr-"  # how the names of headers begin that Flower's server wants
_KEY: Final = "flwr-public-key"
_TIME: Final = "flwr-timestamp"
_REMEMBERED: Final = 700.0  # seconds; Flower takes a signature for 305 to either side
_PATIENCE: Final = 120.0  # seconds that Flower may take
_TELL: Final = 60.0  # seconds between two lines of one kind
_OURS: Final = "this is not for clients"
ENDED: Final = "ended"


@dataclass
class Refusals:
    """Requests that were refused since that was last told: how many of each kind, and from where.

    A kind never holds anything that a stranger has written, so there are few.
    """

    counts: dict[str, int] = field(default_factory=dict)
    last_from: dict[str, str] = field(default_factory=dict)

    def count(self, kind: str, request: Request | None = None) -> None:
        """One more."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if request is not None and request.client is not None:
            self.last_from[kind] = request.client.host

    def tell(self) -> None:
        """Print a line for each kind, and begin anew."""
        now = datetime.now().isoformat(" ", "seconds")
        for kind, count in self.counts.items():
            line = {"time": now, "refused": count, "what": kind}
            print(json.dumps({**line, "last_from": self.last_from.get(kind, "")}), flush=True)
        self.counts.clear()
        self.last_from.clear()

    @asynccontextmanager
    async def told(self, _: Starlette) -> AsyncIterator[None]:
        """Tell now and then while the application runs, and at its end."""

        async def often() -> None:
            while True:
                await asyncio.sleep(_TELL)
                self.tell()

        task = asyncio.create_task(often())
        yield
        task.cancel()
        self.tell()

    def is_other(self, record: logging.LogRecord) -> bool:
        """Count what uvicorn warns of, which is what strangers send; all else goes to the log."""
        if record.levelno == logging.WARNING:
            self.count(str(record.msg))
        return record.levelno != logging.WARNING


def door(inner: str, authority: str | None, most: int, refusals: Refusals) -> Starlette:
    """The application: passes clients' calls on to Flower at `inner`, a URL.

    `most` is the size in bytes of the largest answer of a client.
    """
    verify = True if authority is None else ssl.create_default_context(cafile=authority)
    client = httpx.AsyncClient(base_url=inner, verify=verify, timeout=_PATIENCE)
    seen = _Seen()
    objects = _OBJECTS + -(-most // CHUNK)

    def refuse(request: Request, code: int, why: str) -> Response:
        refusals.count(f"{code} {why}", request)
        return PlainTextResponse(why, code)

    async def pass_on(request: Request) -> Response:
        call = request.path_params["call"]
        if call not in CALLS:
            return refuse(request, 403, _OURS)
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > _MOST:
                    return refuse(request, 413, f"a request has at most {_MOST} bytes")
        except ClientDisconnect:
            return refuse(request, 400, "the request broke off")
        if call == "push-messages" and _has_more(bytes(body), objects):
            return refuse(request, 413, f"an answer has at most {most} bytes")
        signed = _signed(request)
        if not seen.first(signed):
            return refuse(request, 409, "this request has been made before")
        headers = [
            (name, value)
            for name, value in request.headers.raw
            if name.startswith(_PASSED.encode()) or name in (b"content-type", b"accept")
        ]
        try:
            answer = await client.post(f"/v1/fleet/{call}", content=bytes(body), headers=headers)
        except httpx.TransportError as error:  # a client that hears 503 tries again
            seen.forget(signed)
            return PlainTextResponse(f"Flower's server does not answer: {error}", 503)
        if answer.is_error:
            seen.forget(signed)  # strangers cannot fill our memory
        if answer.is_client_error:
            refusals.count(f"{answer.status_code} {call}, by Flower's server", request)
        told = {name: value for name, value in answer.headers.items() if name.startswith(_PASSED)}
        kind = answer.headers.get("content-type")
        return Response(answer.content, answer.status_code, told, media_type=kind)

    async def greet(_: Request) -> Response:
        return PlainTextResponse("a federation's server")  # clients look for it, and at its clock

    async def refuse_other(request: Request, _: Exception) -> Response:
        return refuse(request, 403, _OURS)

    return Starlette(
        routes=[
            Route("/", greet, methods=["GET"]),
            Route("/v1/fleet/{call}", pass_on, methods=["POST"]),
        ],
        exception_handlers={404: refuse_other, 405: refuse_other},
        lifespan=refusals.told,
    )


def closed() -> Starlette:
    """The application after the federation's end: whoever calls hears of it, key or no key."""

    async def tell(_: Request, __: Exception) -> Response:
        return PlainTextResponse("the federation has ended", HTTPStatus.GONE)

    return Starlette(exception_handlers={404: tell})


def _signed(request: Request) -> tuple[bytes, str] | None:
    """What a signature stands for, which a client makes anew for every request: key and time.

    The signature itself would not do: whoever has one can write it in another way.
    """
    try:
        key = b64decode(request.headers[_KEY], validate=True)
        return key, request.headers[_TIME]
    except (KeyError, ValueError):
        return None  # which Flower does not take


@dataclass
class _Seen:
    """The requests of the last minutes."""

    when: OrderedDict[tuple[bytes, str], float] = field(default_factory=OrderedDict)

    def first(self, signed: tuple[bytes, str] | None) -> bool:
        """Whether a request was not made before."""
        now = time.monotonic()
        while self.when and now - next(iter(self.when.values())) > _REMEMBERED:
            self.when.popitem(last=False)
        if signed in self.when:
            return False
        if signed is not None:
            self.when[signed] = now
        return True

    def forget(self, signed: tuple[bytes, str] | None) -> None:
        """Nothing came of this request."""
        if signed is not None:
            self.when.pop(signed, None)


def _has_more(body: bytes, objects: int) -> bool:
    """Whether a client wants to send more objects than these with an answer, a request each."""
    try:
        trees = list(PushMessagesRequest.FromString(body).message_object_trees)
    except DecodeError:
        return False  # which Flower does not take
    count = 0
    while trees and count <= objects:
        count += 1
        trees += trees.pop().children
    return count > objects


def main() -> None:
    """Listen until killed."""
    address, port, most, *files = sys.argv[1:]
    certificate, key, authority = files or (None, None, None)
    refusals = Refusals()
    logging.getLogger("uvicorn.error").addFilter(refusals.is_other)
    inner = f"{'https' if files else 'http'}://127.0.0.1:{port}"
    app = closed() if port == ENDED else door(inner, authority, int(most), refusals)
    host, _, outer = address.rpartition(":")
    uvicorn.run(
        app,
        host=host.strip("[]"),
        port=int(outer),
        log_level="warning",
        ws="none",
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


if __name__ == "__main__":
    main()
