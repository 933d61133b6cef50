"""A client's connection to the server, as a process of its own beside the one that holds the model.

    python -m fedalt.flower.fleet_client ADDRESS KEY CA [NODE]     (CA is "-" without TLS)

It speaks Flower's Fleet protocol, hands every call on through stdout and sends back what comes
in through stdin. Nothing that the server sends is ever run: all that a call can hold is bytes. It
ends with its parent, and where the server does not let it in. It tells the server that it leaves,
or that the last one, NODE, has left, as Flower would keep the next one out for a minute otherwise.
"""

import contextlib
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

from fedalt.flower.addresses import host_and_port
from fedalt.flower.message_content import bytes_of, content_of
from fedalt.flower.parent_pipe import Pipe, pipe_to_parent, receive, send
from fedalt.flower.proxies import reach_loopback_directly, through_proxy
from fedalt.flower.signatures import AHEAD, BEHIND, signed_headers

_PAUSE: Final = 0.2  # seconds between two looks where a call has just been
_LONGEST_PAUSE: Final = 2.0  # where there was none for a while: many look at one server
_RETRY: Final = (1.0, 2.0, 5.0)  # seconds to the next try to reach the server
_TRIES: Final = 20  # of a request, before the connection is made anew
_NOT_NOW: Final = (
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_FORMAT: Final = "application/protobuf"  # of requests
# By OpenSSL's numbers (X509_V_ERR_*).
_BY_TIME: Final = "; the server needs a new certificate, unless this machine's clock is wrong"
_REMEDIES: Final = {
    9: _BY_TIME,  # not yet valid
    10: _BY_TIME,  # has expired
    **dict.fromkeys((18, 19, 20), "; ca.crt has to be the one of this server's federation"),
    **dict.fromkeys((62, 64), "; the server's certificate has to name the address in client.toml"),
}
_LAST_WORDS: Final = 8.0  # seconds that leaving may take

Answer = TypeVar("Answer")


def main() -> None:
    """Connect and pass on, until the parent is gone or the server does not know us any more."""
    address, key_file, ca_file, *last = sys.argv[1:]
    pipe = pipe_to_parent()
    signal.signal(signal.SIGTERM, _leave)
    # Flower sends its own process this signal where the server does not know the key.
    signal.signal(signal.SIGINT, _shut_out)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    reach_loopback_directly(host_and_port(address)[0])
    key: Any = load_ssh_private_key(Path(key_file).read_bytes(), None)
    server = _Server(address, None if ca_file == "-" else ca_file, key)
    try:
        _reach(pipe, server)
        for node in last:
            _sign_off(server, int(node))
        _pass_on(pipe, server)
    except _EndedError:
        send(pipe, "ended")
    except _ShutOutError:
        send(pipe, "trouble", b"the server does not know this connection any more")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing more to say


@dataclass(frozen=True)
class _Server:
    """Where it is, who vouches for it, None without TLS, and the key that it knows us by."""

    address: str
    authority: str | None
    key: Any

    @property
    def insecure(self) -> bool:
        return self.authority is None

    @property
    def certificate(self) -> bytes | None:
        return None if self.authority is None else Path(self.authority).read_bytes()


class _Connection(NamedTuple):
    """What Flower's connection consists of, in its order."""

    node: int
    pull: Callable[[], Any]
    send: Callable[..., tuple[set[str], str]]
    get_run: object
    get_fab: object
    pull_object: Callable[[int, str], bytes]
    push_object: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]


def _sign_off(server: _Server, node: int) -> None:
    """Say that a connection has ended which broke off; it is no matter if that is known."""
    headers = signed_headers(server.key) | {"content-type": _FORMAT, "accept": _FORMAT}
    request = DeactivateNodeRequest(node_id=node).SerializeToString()
    url = f"{_url(server.address, server.authority)}/v1/fleet/deactivate-node"
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, content=request, headers=headers, verify=_trusted(server.authority))


def _pass_on(pipe: Pipe, server: _Server) -> None:
    """Hand on calls and answers for as long as there is a connection.

    Flower tries nothing again: a call whose way here failed is handed out to a new connection only.
    """
    keys = server.key, server.key.public_key()
    with http_request_response(
        server.address, server.insecure, server.certificate, keys, max_retries=0
    ) as parts:
        connection = _Connection(*parts)
        send(pipe, "connected", str(connection.node).encode())
        pause = _PAUSE
        while True:
            if (call := _next_call(connection)) is None:
                time.sleep(pause)
                pause = min(1.2 * pause, _LONGEST_PAUSE)
                continue
            pause = _PAUSE
            message, data = call
            send(pipe, "call", data)
            del call, data  # training takes longer than anything here, beside a large model
            _answer(connection, message, receive(pipe)[1])
            send(pipe, "delivered")


def _next_call(connection: _Connection) -> tuple[Message, bytes] | None:
    """The next call that waits for us, if there is one; what is no call is dropped."""
    try:
        if (waiting := connection.pull()) is None:
            return None
        head, tree = waiting
        run, wanted = head.metadata.run_id, head.metadata.message_id
        names = [node.object_id for node in iterate_object_tree(tree)]
        contents = pull_objects(  # which may still be on their way to the server
            names,
            lambda name: _patiently(lambda: connection.pull_object(run, name)),
            initial_backoff=_PAUSE,
        )
        _patiently(lambda: connection.confirm(run, wanted))
    except RunNotRunningException:  # the server has begun anew since
        return None
    message: Any = inflate_object_from_contents(wanted, contents)
    message.metadata.__dict__["_message_id"] = wanted
    try:
        data = bytes_of(message.content)
        message.content = RecordDict()  # only who has sent it is still to be known
        return message, data
    except ValueError as error:
        print(f"a message that is no call of fedalt: {error}", file=sys.stderr)
        return None


def _answer(connection: _Connection, call: Message, data: bytes) -> None:
    """Send an answer; where the run that asked is over, the next one will ask again."""
    reply = Message(content_of(data), reply_to=call)
    run = call.metadata.run_id
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        try:
            tree = get_object_tree(reply)
            wanted, session = _patiently(lambda: connection.send(reply, tree, 0.0))
            push_object_contents_from_iterable(
                ((name, part.deflate()) for name, part in objects.items() if name in wanted),
                push_object_fn=lambda name, content: _patiently(
                    lambda: connection.push_object(run, session, name, content)
                ),
            )
        except RunNotRunningException:
            print("the server has begun anew; it will ask again", file=sys.stderr)


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Ask again where the network failed; only what may be asked twice. Raises httpx.HTTPError."""
    for tried in range(_TRIES):
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in _NOT_NOW:
                raise
        except httpx.TransportError:
            pass
        time.sleep(_RETRY[min(tried, len(_RETRY) - 1)])
    return ask()


def _reach(pipe: Pipe, server: _Server) -> None:
    """Wait until the server answers, proves who it is, and has the same time as we have."""
    tries = 0
    while (trouble := server_trouble(server.address, server.authority)) is not None:
        send(pipe, "trouble", trouble.encode())
        time.sleep(_RETRY[min(tries, len(_RETRY) - 1)])
        tries += 1


def server_trouble(address: str, authority: str | None) -> str | None:
    """Why nobody can work with the server at this address, or None. Raises `_EndedError`."""
    asked = time.time()
    try:
        answer = httpx.get(f"{_url(address, authority)}/", verify=_trusted(authority))
    except (httpx.TransportError, ssl.SSLError) as error:
        proxy = through_proxy(address, secure=authority is not None)
        return f"{address} cannot be reached: {error}{_remedy(error)}{proxy}"
    if answer.status_code == HTTPStatus.GONE:
        raise _EndedError
    date = answer.headers.get("date")
    if date is None:
        return None
    ahead = asked - parsedate_to_datetime(date).timestamp()
    if -BEHIND < ahead < AHEAD:
        return None
    return (
        f"this machine's clock is {abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} "
        f"that of {address}; at most {AHEAD:.0f} ahead and {BEHIND:.0f} behind are taken"
    )


def _remedy(error: BaseException | None) -> str:
    """What to do about a certificate that is not taken, as the end of a sentence; "" otherwise."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__context__  # httpx's and httpcore's own stand before it
    return "" if error is None else _REMEDIES.get(error.verify_code, "")


def _url(address: str, authority: str | None) -> str:
    return f"{'http' if authority is None else 'https'}://{address}"


def _trusted(authority: str | None) -> ssl.SSLContext | bool:
    return True if authority is None else ssl.create_default_context(cafile=authority)


class _EndedError(Exception):
    """The server says that the federation has ended."""


class _ShutOutError(BaseException):
    """The server does not know our key, or has begun anew; Flower's own code lets only such an
    exception pass.
    """


def _shut_out(*_: object) -> NoReturn:
    raise _ShutOutError


def _leave(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is being done
    threading.Thread(target=_end_soon, daemon=True).start()
    sys.exit(0)


def _end_soon() -> None:
    time.sleep(_LAST_WORDS)
    os._exit(0)


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has closed its end
        main()
