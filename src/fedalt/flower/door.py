"""What a federation's clients reach of Flower's server, and nothing else.

    python -m fedalt.flower.door ADDRESS INNER_PORT MOST_BYTES [CERTIFICATE KEY AUTHORITY]

Flower serves three interfaces at one port. Only one is for clients and asks for a key; over the
others anybody may start programs on the server and on its clients. So Flower listens on loopback,
and this process passes on from outside what belongs to clients.
"""

import binascii
import ssl
import sys
import time
from base64 import b64decode
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import httpx
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.applications import Starlette
from starlette.requests import Request
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


def door(inner: str, authority: str | None, most: int) -> Starlette:
    """The application: passes clients' calls on to Flower at `inner`, a URL.

    `most` is the size in bytes of the largest answer of a client.
    """
    verify = True if authority is None else ssl.create_default_context(cafile=authority)
    client = httpx.AsyncClient(base_url=inner, verify=verify, timeout=_PATIENCE)
    seen = _Seen()
    objects = _OBJECTS + -(-most // CHUNK)

    async def pass_on(request: Request) -> Response:
        call = request.path_params["call"]
        if call not in CALLS:
            return PlainTextResponse("this is not for clients", 403)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _MOST:
                return PlainTextResponse(f"a request has at most {_MOST} bytes", 413)
        if call == "push-messages" and _has_more(bytes(body), objects):
            return PlainTextResponse(f"an answer has at most {most} bytes", 413)
        signed = _signed(request)
        if not seen.first(signed):
            return PlainTextResponse("this request has been made before", 409)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.startswith(_PASSED) or name in ("content-type", "accept")
        }
        try:
            answer = await client.post(f"/v1/fleet/{call}", content=bytes(body), headers=headers)
        except httpx.TransportError as error:  # a client that hears 503 tries again
            seen.forget(signed)
            return PlainTextResponse(f"Flower's server does not answer: {error}", 503)
        if answer.is_error:
            seen.forget(signed)  # strangers cannot fill our memory
        told = {name: value for name, value in answer.headers.items() if name.startswith(_PASSED)}
        kind = answer.headers.get("content-type")
        return Response(answer.content, answer.status_code, told, media_type=kind)

    async def refuse(_: Request) -> Response:
        return PlainTextResponse("this is not for clients", 403)

    return Starlette(
        routes=[
            Route("/v1/fleet/{call}", pass_on, methods=["POST"]),
            Route("/{path:path}", refuse, methods=["GET", "HEAD", "POST", "PUT", "DELETE"]),
        ]
    )


def _signed(request: Request) -> tuple[bytes, str] | None:
    """What a signature stands for, which a client makes anew for every request: key and time.

    The signature itself would not do: whoever has one can write it in another way.
    """
    try:
        key = b64decode(request.headers[_KEY], validate=True)
        return key, request.headers[_TIME]
    except (KeyError, binascii.Error):
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
    app = door(f"{'https' if files else 'http'}://127.0.0.1:{port}", authority, int(most))
    host, _, outer = address.rpartition(":")
    uvicorn.run(
        app,
        host=host.strip("[]"),
        port=int(outer),
        log_level="warning",
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


if __name__ == "__main__":
    main()
