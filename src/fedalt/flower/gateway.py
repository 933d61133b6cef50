"""What a federation's clients reach of Flower's server, and nothing else.

    python -m fedalt.flower.gateway ADDRESS INNER_PORT MOST_BYTES [CERTIFICATE KEY AUTHORITY]
        [--keys FILE] [--spool FOLDER] [--keyless NUMBER] [--keyless-per-address NUMBER]

Flower serves three interfaces at one port. Only one is for clients and asks for a key, once it has
read a request; over the others anybody may start programs on the server and on its clients. So
Flower listens on loopback, and this process passes on from outside what belongs to clients.

Of a request without a client's signature it reads the headers and no more. A client's bodies lie on
disk until they are whole, so that neither a slow nor a large one takes memory here or a place at
Flower's server. What it refuses it counts, and prints once a minute: one line of JSON for each
kind, so that strangers cannot fill the disk.

Where INNER_PORT is "ended", it tells whoever calls that the federation has ended.
"""

import argparse
import asyncio
import logging
import resource
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import httpx
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.loops.auto import auto_loop_factory

from fedalt.flower.addresses import host_and_port
from fedalt.flower.bodies import Body, BodyStore, IncomingBody, NoRoomError, parts
from fedalt.flower.connections import Connection, Connections, listeners
from fedalt.flower.message_content import CHUNK
from fedalt.flower.refusals import Refusals
from fedalt.flower.signatures import Signatures, UnsignedError

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
# Bytes of one request; Flower sends large arrays in pieces, two at a time.
LARGEST_REQUEST: Final = 2 * CHUNK
_PER_KEY: Final = 8 * LARGEST_REQUEST  # bytes on disk of one client's requests at a time
_IN_ALL: Final = 128 * LARGEST_REQUEST  # and of everyone's
_OBJECTS: Final = 8  # a message's own beside its arrays
_PASSED: Final = "flwr-"  # how the names of headers begin that Flower's server wants
_HEADERS: Final = 16 * 2**10  # bytes of all headers of a request
_PATIENCE: Final = 120.0  # seconds that Flower may take
_IDLE: Final = 15  # seconds that a client's connection stays without a request; its own end waits 5
_NOT_FOR_CLIENTS: Final = "this is not for clients"
_CLOSE: Final = {"connection": "close"}
ENDED: Final = "ended"


@dataclass(frozen=True)
class Gateway:
    """Passes clients' calls on to Flower at `flower`.

    `objects` is how many an answer of a client may consist of, `most` its size in bytes.
    """

    flower: httpx.AsyncClient
    signatures: Signatures
    connections: Connections
    bodies: BodyStore
    objects: int
    most: int
    refusals: Refusals

    async def pass_on(self, request: Request) -> Response:
        """Answer a request as Flower does, if it is a client's."""
        call = request.path_params["call"]
        if call not in CALLS:
            return self.refuse(request, 403, _NOT_FOR_CLIENTS)
        try:
            key = self.signatures.key_of(request.headers, call)
        except UnsignedError as error:
            return self.refuse(request, error.code, error.text, error.kind)
        connection: Connection = request.state.connection
        self.connections.introduce(connection, key)
        with self.bodies.body(key) as body:
            try:
                await body.receive(request.stream(), LARGEST_REQUEST)
            except ClientDisconnect:
                return self.refuse(request, 400, "the request broke off")
            except NoRoomError:  # a client that hears 503 tries again
                return self.refuse(request, 503, "no room for more requests now")
            if body.size > LARGEST_REQUEST:
                return self.refuse(request, 413, f"a request has at most {LARGEST_REQUEST} bytes")
            if call == "push-messages" and _has_more(body.file, self.objects):
                return self.refuse(request, 413, f"an answer has at most {self.most} bytes")
            connection.is_ours = True
            try:
                return await self._ask(request, call, body)
            except httpx.TransportError as error:
                return PlainTextResponse(f"Flower's server does not answer: {error}", 503)
            except OSError:  # the disk is full
                return self.refuse(request, 503, "no room for an answer now")
            finally:
                connection.is_ours = False

    async def _ask(self, request: Request, call: str, body: IncomingBody) -> Response:
        """What Flower's server answers."""
        headers = [
            (name, value)
            for name, value in request.headers.raw
            if name.startswith(_PASSED.encode()) or name in (b"content-type", b"accept")
        ]
        headers.append((b"content-length", str(body.size).encode()))
        content, size = self.bodies.new_body(), 0
        sent = self.flower.build_request(
            "POST", f"/v1/fleet/{call}", content=parts(body.file), headers=headers
        )
        answer = await self.flower.send(sent, stream=True)
        try:
            async for part in answer.aiter_bytes():
                content.write(part)
                size += len(part)
        finally:
            await answer.aclose()
        if answer.is_client_error:
            kind = f"{answer.status_code} {call}, by Flower's server"
            self.refusals.count(kind, _address(request))
        passed = {name: value for name, value in answer.headers.items() if name.startswith(_PASSED)}
        passed["content-length"] = str(size)
        media_type = answer.headers.get("content-type")
        return StreamingResponse(parts(content), answer.status_code, passed, media_type=media_type)

    def refuse(self, request: Request, code: int, text: str, kind: str | None = None) -> Response:
        """The answer to what is not passed on; the connection ends, as its body is not read."""
        self.refusals.count(f"{code} {kind or text}", _address(request))
        return PlainTextResponse(text, code, _CLOSE)


def open_app(gateway: Gateway) -> Starlette:
    """The application of a federation that goes on."""

    async def refuse_other(request: Request, _: Exception) -> Response:
        return gateway.refuse(request, 403, _NOT_FOR_CLIENTS)

    return Starlette(
        routes=[
            Route("/", _greet, methods=["GET"]),
            Route("/v1/fleet/{call}", gateway.pass_on, methods=["POST"]),
        ],
        exception_handlers={404: refuse_other, 405: refuse_other},
        lifespan=gateway.refusals.reporting,
    )


async def _greet(_: Request) -> Response:
    """Clients look whether the server is there, and at its clock."""
    return PlainTextResponse("a federation's server", headers=_CLOSE)


def ended_app(refusals: Refusals) -> Starlette:
    """The application after the federation's end: whoever calls hears of it, key or no key."""

    async def answer(_: Request, __: Exception) -> Response:
        return PlainTextResponse("the federation has ended", HTTPStatus.GONE, _CLOSE)

    return Starlette(exception_handlers={404: answer}, lifespan=refusals.reporting)


def _address(request: Request) -> str | None:
    return None if request.client is None else request.client.host


def _has_more(file: Body, objects: int) -> bool:
    """Whether a client wants to send more objects than these with an answer, a request each."""
    file.seek(0)
    try:
        trees = list(PushMessagesRequest.FromString(file.read()).message_object_trees)
    except DecodeError:
        return False  # which Flower does not take
    count = 0
    while trees and count <= objects:
        count += 1
        trees += trees.pop().children
    return count > objects


async def serve(words: argparse.Namespace) -> None:
    """Listen as the command line says, until this process is asked to end."""
    refusals, signatures = Refusals(), Signatures(words.keys)
    connections = Connections(words.keyless, words.keyless_per_address, refusals)
    logging.getLogger("uvicorn.error").addFilter(refusals.is_other)
    asyncio.get_running_loop().set_exception_handler(refusals.count_fault)
    sockets = listeners(*host_and_port(words.address))

    def keys() -> Mapping[bytes, object]:
        signatures.read()
        return signatures.keys

    app, context = ended_app(refusals), None
    if words.inner != ENDED:
        keys()
        app = open_app(_gateway(words, signatures, connections, refusals))
    if words.certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(words.certificate, words.key)
    config = uvicorn.Config(
        app,
        http="h11",  # which has a limit for headers
        h11_max_incomplete_event_size=_HEADERS,
        log_level="warning",
        ws="none",
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[]))
    while not server.started:
        await asyncio.sleep(0.01)

    def speak(connection: Connection) -> asyncio.Protocol:
        make: Any = config.http_protocol_class
        protocol: asyncio.Protocol = make(config, server.server_state, {"connection": connection})
        return protocol

    loops = [connections.accept(listener, context, speak) for listener in sockets]
    loops += [connections.watch(keys)]
    tasks = [serving, *map(asyncio.create_task, loops)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    ended = [task for task in tasks if task.done()]  # only `serving`, unless there is a fault
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in ended:
        task.result()


def _gateway(
    words: argparse.Namespace,
    signatures: Signatures,
    connections: Connections,
    refusals: Refusals,
) -> Gateway:
    authority = words.authority
    scheme = "http" if authority is None else "https"
    verify = True if authority is None else ssl.create_default_context(cafile=authority)
    return Gateway(
        flower=httpx.AsyncClient(
            base_url=f"{scheme}://127.0.0.1:{words.inner}", verify=verify, timeout=_PATIENCE
        ),
        signatures=signatures,
        connections=connections,
        bodies=BodyStore(words.spool, _PER_KEY, _IN_ALL),
        objects=_OBJECTS + -(-words.most // CHUNK),
        most=words.most,
        refusals=refusals,
    )


def main() -> None:
    """Listen until killed."""
    parser = argparse.ArgumentParser(prog="python -m fedalt.flower.gateway")
    parser.add_argument("address")
    parser.add_argument("inner")
    parser.add_argument("most", type=int)
    for file in ("certificate", "key", "authority"):
        parser.add_argument(file, nargs="?")
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--spool", type=Path)
    parser.add_argument("--keyless", type=int, default=256)  # as in config.py, without PyTorch
    parser.add_argument("--keyless-per-address", type=int, default=128)
    words = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is one
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(serve(words))


if __name__ == "__main__":
    main()
