"""The files that an operator and the owner of a client write, read whole."""

from dataclasses import dataclass, replace
from pathlib import Path

from fedalt.core.declared import SettingsError, section_of
from fedalt.core.upload_settings import Firewall
from fedalt.data.names import fault_of_names
from fedalt.federation import roster
from fedalt.federation.agreement import Agreement, read_agreement
from fedalt.federation.rules import Rules
from fedalt.flower.places import ClientPlace, ServerPlace, read_client_place, read_server_place


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
