"""Making a federation: a folder for the server and one for each client, ready to be sent out."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import tomli_w

from fedalt.federation.terms import Terms, write_terms
from fedalt.files import make_private_folder
from fedalt.flower.credentials import make_authority, make_client_key, make_server
from fedalt.prepare import Parts
from fedalt.settings import SettingsError, method_name


def found_federation(
    folder: Path,
    clients: Sequence[str],
    parts: Parts,
    *,
    name: str,
    address: str,
    labels: Sequence[str] = (),
) -> Terms:
    """Write `authority`, `server` and `clients/ID` into a new folder.

    `address` is where the server listens and what the clients call, host:port. Raises what
    `require_possible` does.
    """
    host = require_possible(folder, clients, address)
    authority, server = folder / "authority", folder / "server"
    keys = server / "clients"
    for private in (authority, keys):
        make_private_folder(private)
    make_authority(authority, name)
    make_server(server, authority, [host.strip("[]"), "localhost", "127.0.0.1"])
    terms = write_terms(server, name, clients, labels, parts)
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


def require_possible(folder: Path, clients: Sequence[str], address: str) -> str:
    """The host of the address; SettingsError for what no federation can be made of.

    That is a folder in use, names that cannot be folders, and an address without a port.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise SettingsError(f"address {address!r}: expected host:port, such as 10.0.0.5:8443")
    if len(set(clients)) < len(clients) or not clients:
        raise SettingsError(f"clients {', '.join(clients)!r}: expected different names")
    for each in clients:
        if not each or each != Path(each).name or each.startswith("."):
            raise SettingsError(f"client {each!r}: such a name cannot be a folder's")
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} exists already and is not empty")
    return host


def _write(file: Path, table: dict[str, object]) -> None:
    file.write_text(tomli_w.dumps(table), encoding="utf-8")


# Where the operator starts from: every client has drawn the same A, which norms are mostly of.
_FIREWALL: Final = {"norm_limit": 10.0}

_AUTHORITY = """\
# The certificate authority

`ca.key` signs the server's certificate. Whoever has it can pass for the server. Keep this folder
offline, on neither the server nor a client; it is needed again when the server's certificate ends
(after two years) or its address changes.
"""


def _server_readme(terms: Terms, address: str) -> str:
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


def _client_readme(terms: Terms, client_id: str, address: str) -> str:
    method = method_name(terms.settings.method)
    return f"""\
# Client {client_id!r} of {terms.name!r}

This folder goes to the machine that holds the data, and to nobody else: `client.key` is how the
server knows this client.

1. Put the data into `data/`: `{client_id}.train.jsonl`, and, to know what it is worth,
   `{client_id}.validation.jsonl` and `{client_id}.test.jsonl`.
2. Put the base model where `terms.toml` says: {terms.settings.model.name!r}.
3. Run

        pip install 'fedalt[flower]'
        fedalt data check data
        fedalt client --config client.toml

It calls {address}; no port is opened here. Stop it with Ctrl-C; the same command goes on where it
was. Back up `state/`: what it holds of this client is nowhere else.

What leaves this machine: the upload of {method} (adapter weights), losses and scores, and
how many examples there are. What never leaves: texts, tokens, and what the method keeps private.
An adapter can reveal something about the data that it was trained on.
"""
