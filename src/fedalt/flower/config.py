"""The files an operator and a client's owner write: where things lie, and what they decide."""

import tomllib
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from fedalt.data.encodings import EncodingError, decoded
from fedalt.data.names import fault_of_names
from fedalt.engine.firewall import Firewall
from fedalt.federation.agreement import Agreement, read_agreement
from fedalt.federation.client import Client, OnEvent, ignore, open_client
from fedalt.federation.owner_messages import Say, silent
from fedalt.federation.round_collector import Rules
from fedalt.runs.settings import SettingsError, section_of


@dataclass(frozen=True, kw_only=True)
class ServerPlace:
    """`address` is where clients come in, host:port; `folder` keeps the server's state.

    Relative paths are those of the configuration's own folder. `insecure` leaves out encryption
    and keys. `warn_below` clients, what one receives tells too much about another. Connections
    over which no client's key was shown yet are at most `keyless`, and `keyless_per_address` of one
    address, behind which several clients may be.
    """

    address: str = "127.0.0.1:8443"
    folder: Path = Path("state")
    certificate: Path = Path("server.crt")
    key: Path = Path("server.key")
    authority: Path = Path("ca.crt")
    clients: Path = Path("clients")
    insecure: bool = False
    warn_below: int = 3
    keyless: int = 256
    keyless_per_address: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.keyless_per_address <= self.keyless:
            raise ValueError(
                f"keyless_per_address = {self.keyless_per_address} and keyless = {self.keyless}: "
                "expected at least 1, and no more of one address than in all"
            )

    @property
    def run(self) -> Path:
        """The federation's own folder; a run's, for `fedalt watch` and `fedalt report`."""
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        """What the processes say."""
        return self.folder / "logs"

    @property
    def flower(self) -> Path:
        """What Flower keeps."""
        return self.folder / "flower"

    @property
    def let_in(self) -> Path:
        """The keys that are let in, for the door."""
        return self.flower / "keys.json"

    @property
    def app_log(self) -> Path:
        """What has ended the app too early."""
        return self.logs / "app.log"

    @property
    def pid(self) -> Path:
        """The number of the app's process."""
        return self.folder / "app.pid"

    @property
    def ended(self) -> Path:
        """There when the federation has ended."""
        return self.folder / "ended"

    @property
    def failed(self) -> Path:
        """Why the app could not go on, if it could not."""
        return self.folder / "failed.txt"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All that `fedalt server` needs."""

    file: Path
    terms: Agreement
    place: ServerPlace
    rules: Rules
    firewall: Firewall


@dataclass(frozen=True, kw_only=True)
class ClientPlace:
    """`name` is the client, `data` its files, `folder` its state, `server` the host:port to call.

    `model` is where the base model lies here, if not where the terms say.
    """

    name: str
    server: str
    data: Path = Path("data")
    folder: Path = Path("state")
    key: Path = Path("client.key")
    authority: Path = Path("ca.crt")
    model: str | None = None
    device: str | None = None
    insecure: bool = False


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """All that `fedalt client` needs."""

    file: Path
    terms: Agreement
    place: ClientPlace


def read_server_config(file: Path, *, insecure: bool = False) -> ServerConfig:
    """An operator's federation.toml, beside which the terms lie. Raises SettingsError."""
    table = _table(file, {"server", "rules", "firewall"})
    place = _place(ServerPlace, table.get("server", {}), file, "server")
    return ServerConfig(
        file=file.absolute(),
        terms=read_agreement(file.parent / "terms.toml"),
        place=replace(place, insecure=insecure or place.insecure),
        rules=section_of(Rules, table.get("rules", {}), str(file), "rules"),
        firewall=section_of(Firewall, table.get("firewall", {}), str(file), "firewall"),
    )


def read_client_config(file: Path, *, insecure: bool = False) -> ClientConfig:
    """A client's client.toml, beside which the terms lie. Raises SettingsError."""
    table = _table(file, {"client"})
    place = _place(ClientPlace, table.get("client", {}), file, "client")
    if fault := fault_of_names([place.name]):
        raise SettingsError(f"{file}: [client] {fault}")
    return ClientConfig(
        file=file.absolute(),
        terms=read_agreement(file.parent / "terms.toml"),
        place=replace(place, insecure=insecure or place.insecure),
    )


def member_of(config: ClientConfig, on_event: OnEvent = ignore, say: Say = silent) -> Client:
    """The client of a configuration, its model loaded and its data read; see `open_client`."""
    place = config.place
    try:
        return open_client(
            config.terms,
            place.name,
            place.data,
            place.folder,
            model=place.model,
            device=place.device,
            on_event=on_event,
            say=say,
        )
    except SettingsError as error:  # whose name and places are this file's
        raise SettingsError(f"{config.file}: {error}") from None


def _table(file: Path, known: set[str]) -> dict[str, Any]:
    try:
        table = tomllib.loads(decoded(file.read_bytes()))
    except FileNotFoundError:
        raise SettingsError(f"{file}: there is no such file") from None
    except (OSError, EncodingError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file}: cannot be read: {error}") from None
    for section, value in table.items():
        if section in known and not isinstance(value, dict):
            raise SettingsError(f"{file}: [{section}]: expected a section, got {value!r}")
    if unknown := table.keys() - known:
        raise SettingsError(
            f"{file}: unknown section [{min(unknown)}]; expected {', '.join(sorted(known))}"
        )
    return table


def _place(cls: Any, table: dict[str, Any], file: Path, section: str) -> Any:
    """A section whose paths are relative to the file's folder."""
    needed = [each.name for each in fields(cls) if each.default is MISSING]
    if missing := set(needed) - table.keys():
        raise SettingsError(f"{file}: [{section}] {min(missing)} is missing")
    hints = get_type_hints(cls)
    place = section_of(cls, table, str(file), section)
    root = file.absolute().parent
    paths = {name: root / getattr(place, name) for name, hint in hints.items() if hint is Path}
    return replace(place, **paths)
