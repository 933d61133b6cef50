"""Who is not let in: attempts on a running server of a federation, and what each of them sees."""

import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import tomli_w
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from machines import Machines, wait_for

from fedalt.flower.credentials import make_authority, make_client_key, make_server
from fedalt.flower.gateway import LARGEST_REQUEST
from fedalt.flower.processes import free_port, wait_for_port

# What is to be seen of each attempt, in part.
REFUSED = {
    "a key that the server does not know": "the server does not let this client in",
    "another certificate authority": "certificate verify failed: unable to get local issuer",
    "the server's certificate has ended": "certificate verify failed: certificate has expired",
    "plain HTTP to the port that wants TLS": "cannot be reached",
    "a request that was made before": "409 this request has been made before",
    "a request of yesterday": "401",
    "another client's node": "401",
    "no signature": "401",
    "registering a key oneself": "403 this is not for clients",
    "Flower's Control interface": "403 this is not for clients",
    "Flower's Runtime interface": "403 this is not for clients",
    "Flower's list of interfaces": "403 this is not for clients",
    "a way round": "403 this is not for clients",
    "a gigantic request": "413 a request has at most 33554432 bytes",
    "plain HTTP": "Server disconnected without sending a response",
    "a key that was revoked while connected": "the server does not let this client in",
}


@dataclass(frozen=True)
class Attempt:
    """What was tried, and what whoever tried it has seen."""

    what: str
    seen: str


def not_refused(tried: Sequence[Attempt]) -> list[str]:
    """What is wrong with these attempts: those that were not refused as they should be, or made."""
    seen = {each.what: each.seen for each in tried}
    wrong = [
        f"{what}: seen was {text!r}, not {REFUSED.get(what, 'anything')!r}"
        for what, text in seen.items()
        if what not in REFUSED or REFUSED[what] not in text
    ]
    return wrong + [f"{what}: nobody has tried it" for what in REFUSED if what not in seen]


def attempts(machines: Machines) -> list[Attempt]:
    """Try everything on a running server whose clients a and b are not there yet."""
    return [*clients(machines), *requests(machines), revoked(machines)]


def clients(machines: Machines) -> list[Attempt]:
    """`fedalt client` with something wrong about it, and what it prints."""
    other = machines.root / "other"
    other.mkdir()
    make_authority(other, "another federation")
    make_client_key(other / "client.key", other / "client.pub")
    ended, gateway = _gateway_whose_certificate_has_ended(machines)
    wrong: dict[str, dict[str, Any]] = {
        "a key that the server does not know": {"key": str(other / "client.key")},
        "another certificate authority": {"authority": str(other / "ca.crt")},
        "the server's certificate has ended": {"server": ended},
        "plain HTTP to the port that wants TLS": {"insecure": True},
    }
    names = [f"wrong-{number}" for number in range(len(wrong))]
    for name, changes in zip(names, wrong.values(), strict=True):
        _variant(machines, name, changes)
        machines.start(name)
    found = []
    for name, what in zip(names, wrong, strict=True):
        wait_for(lambda name=name: "; trying again" in machines.said(name), what)
        machines.started[name].terminate()
        machines.started[name].wait()
        line = next(each for each in machines.said(name).splitlines() if "; trying again" in each)
        text = line.split("a: ", 1)[1]
        for address in (machines.address, ended):
            text = text.replace(address, "ADDRESS")
        found.append(Attempt(what, text))
    gateway.kill()
    gateway.wait()
    return found


def requests(machines: Machines) -> list[Attempt]:
    """Requests to the gateway, and how they are answered."""
    key = load_ssh_private_key((machines.client("a") / "client.key").read_bytes(), None)
    context = httpx.create_ssl_context(verify=str(machines.server / "ca.crt"))
    pull = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
    with httpx.Client(base_url=f"https://{machines.address}", verify=context) as web:

        def post(path: str, content: bytes = pull, headers: Any = None) -> str:
            sent = {"content-type": PROTOBUF_MEDIA_TYPE, **(headers or signed(key))}
            answer = web.post(path, content=content, headers=sent)
            return f"{answer.status_code} {answer.text}"

        mine = activation(key)
        taken = signed(key)
        assert post("/v1/fleet/activate-node", mine, taken).startswith("200")
        old = signed(key, datetime.now(UTC) - timedelta(days=1))
        found = [
            Attempt("a request that was made before", post("/v1/fleet/activate-node", mine, taken)),
            Attempt("a request of yesterday", post("/v1/fleet/pull-messages", headers=old)),
            Attempt("another client's node", post("/v1/fleet/pull-messages")),
            Attempt("no signature", post("/v1/fleet/pull-messages", headers={"flwr-x": ""})),
            Attempt("registering a key oneself", post("/v1/fleet/register-node")),
            Attempt("Flower's Control interface", post("/v1/control/start-run")),
            Attempt("Flower's Runtime interface", post("/v1/runtime/pull-task-input")),
            Attempt("Flower's list of interfaces", _get(web, "/docs")),
            Attempt("a way round", post("/v1/fleet/..%2Fcontrol%2Fstart-run")),
            Attempt(
                "a gigantic request", post("/v1/fleet/push-object", bytes(LARGEST_REQUEST + 1))
            ),
        ]
    with httpx.Client(base_url=f"http://{machines.address}") as web:
        try:
            seen = _get(web, "/")
        except httpx.TransportError as error:
            seen = str(error)
        found.append(Attempt("plain HTTP", seen))
    return found


def revoked(machines: Machines) -> Attempt:
    """A client whose key is taken away while it is connected."""
    machines.start("b")
    machines.wait_for(lambda: "b: connected" in machines.said("b"), "b")
    config = ["--config", str(machines.server / "federation.toml")]
    command = [sys.executable, "-m", "fedalt", "federation", "revoke", *config, "b"]
    subprocess.run(command, check=True, capture_output=True)
    machines.wait_for(lambda: "does not let this client in" in machines.said("b"), "the revocation")
    machines.started["b"].terminate()
    machines.started["b"].wait()
    lines = machines.said("b").splitlines()
    line = next(each for each in lines if "does not let this client in" in each)
    return Attempt("a key that was revoked while connected", line.split("b: ", 1)[1])


def signed(key: Any, at: datetime | None = None) -> dict[str, str]:
    """The headers by which a client says who it is."""
    when = (at or datetime.now(UTC)).isoformat()
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": when,
        "flwr-signature": b64encode(sign_message(key, when.encode())).decode(),
    }


def activation(key: Any) -> bytes:
    """The first request of a client."""
    public = public_key_to_bytes(key.public_key())
    return ActivateNodeRequest(public_key=public, heartbeat_interval=30).SerializeToString()


def _get(web: httpx.Client, path: str) -> str:
    answer = web.get(path)
    return f"{answer.status_code} {answer.text}"


def _variant(machines: Machines, name: str, changes: dict[str, Any]) -> None:
    """A folder of client a in which something is otherwise."""
    theirs, place = machines.client("a"), machines.client(name)
    place.mkdir()
    shutil.copy(theirs / "terms.toml", place)
    about = {
        "name": "a",
        "server": machines.address,
        "data": str(theirs / "data"),
        "key": str(theirs / "client.key"),
        "authority": str(theirs / "ca.crt"),
        **changes,
    }
    (place / "client.toml").write_text(tomli_w.dumps({"client": about}))


def _gateway_whose_certificate_has_ended(
    machines: Machines,
) -> tuple[str, "subprocess.Popen[bytes]"]:
    folder = machines.root / "ended"
    folder.mkdir()
    make_server(folder, machines.root / "authority", ["127.0.0.1"], days=-1)
    line = machines.superlink().cmdline()
    inner, port = line[line.index("--port") + 1], free_port()
    files = [folder / "server.crt", folder / "server.key", machines.server / "ca.crt"]
    words = [f"127.0.0.1:{port}", inner, "1000000", *map(str, files)]
    process = subprocess.Popen([sys.executable, "-m", "fedalt.flower.gateway", *words])
    assert wait_for_port(port, process, 60)
    return f"127.0.0.1:{port}", process
