"""The files that an operator and the owner of a client write, and what is opened by them."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from fedalt.core.declared import SettingsError, section_of
from fedalt.core.files import make_private_folder, open_private
from fedalt.core.foreign import shown
from fedalt.core.upload_settings import Firewall
from fedalt.data.names import fault_of_names
from fedalt.engine.firewall import Screening
from fedalt.federation import roster
from fedalt.federation.agreement import Agreement, read_agreement
from fedalt.federation.client import Client
from fedalt.federation.client_folder import open_client
from fedalt.federation.owner_messages import Say, silent
from fedalt.federation.rules import Rules
from fedalt.federation.server import Server
from fedalt.federation.server_folder import open_server
from fedalt.federation.transport import Transport
from fedalt.flower.credentials import PEERS, KeyFolder
from fedalt.flower.places import ClientPlace, ServerPlace, read_client_place, read_server_place
from fedalt.flower.revocation import record_revoked
from fedalt.models.base import Base

_LINE: Final = 1000  # characters at most of a line, which may quote a client


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All that `fedalt server` needs."""

    file: Path
    terms: Agreement
    place: ServerPlace
    rules: Rules
    firewall: Firewall

    @property
    def roster(self) -> Path:
        """Who was added and removed since the terms were agreed."""
        return self.file.parent / roster.FILE

    @property
    def clients(self) -> tuple[str, ...]:
        """Everyone of the terms or added since, sorted."""
        return roster.read_roster(self.roster).clients(self.terms.clients)


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """All that `fedalt client` needs; `go_back`: follow a server that was set back, once."""

    file: Path
    terms: Agreement
    place: ClientPlace
    go_back: bool = False


def read_server_config(file: Path, *, insecure: bool = False) -> ServerConfig:
    """An operator's federation.toml, beside which the terms lie. Raises SettingsError."""
    place, table = read_server_place(file, insecure=insecure)
    return ServerConfig(
        file=file.absolute(),
        terms=read_agreement(file.parent / "terms.toml"),
        place=place,
        rules=section_of(Rules, table.get("rules", {}), str(file), "rules"),
        firewall=section_of(Firewall, table.get("firewall", {}), str(file), "firewall"),
    )


def read_client_config(file: Path, *, insecure: bool = False) -> ClientConfig:
    """A client's client.toml, beside which the terms lie. Raises SettingsError."""
    place = read_client_place(file, insecure=insecure)
    if fault := fault_of_names([place.name]):
        raise SettingsError(f"{file}: [client] {fault}")
    terms = read_agreement(file.parent / "terms.toml")
    if place.added:
        terms = replace(terms, clients=tuple(sorted({*terms.clients, place.name})))
    return ClientConfig(file=file.absolute(), terms=terms, place=place)


def server_from(config: ServerConfig, transport: Transport) -> Server:
    """The server of a configuration over any channel; its folder is made if it is missing.

    Raises what `open_server` does.
    """
    rounds = config.terms.settings.rounds
    screening = Screening(config.firewall, rounds.robust, rounds.trim)
    log = config.place.logs / "server.log"
    make_private_folder(log.parent)
    say = partial(_write_line, log)
    place = config.terms, config.place.run, transport
    signatures = KeyFolder(config.place.clients)
    try:
        server = open_server(*place, config.rules, screening, say, config.roster, signatures)
    except SettingsError as error:  # whose rules are this file's
        raise SettingsError(f"{config.file}: {error}") from None
    record_revoked(config.place)
    return server


def client_from(config: ClientConfig, say: Say = silent, base: Base | None = None) -> Client:
    """The client of a configuration, its model loaded and its data read; see `open_client`."""
    place = config.place
    if config.go_back and config.terms.settings.privacy.unit == "client":
        raise SettingsError(
            f"{config.file}: --go-back makes no sense with [privacy] unit = 'client' in the terms: "
            "the rounds since have been sent with noise that the server has forgotten, and would "
            "be sent again with other noise"
        )
    try:
        client = open_client(
            config.terms,
            place.name,
            place.data,
            place.folder,
            model=place.model,
            device=place.device,
            say=say,
            signatures=KeyFolder(config.file.parent / PEERS, place.key),
            base=base,
        )
    except SettingsError as error:  # whose name and places are this file's
        raise SettingsError(f"{config.file}: {error}") from None
    client.accepted.may_go_back = config.go_back
    return client


def _write_line(log: Path, text: str) -> None:
    """A line for the operator; `fedalt server` reads along."""
    with open_private(log, "a") as file:
        file.write(f"{shown(text, _LINE)}\n")
