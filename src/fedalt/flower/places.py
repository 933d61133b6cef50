"""Where the files of a server and of a client lie, as federation.toml and client.toml say.

No tensor library is imported: `fedalt federation status` needs nothing else.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from fedalt.core.declared import SettingsError, declared, section_of, setting
from fedalt.core.reading import FormError, require
from fedalt.flower.addresses import require_address
from fedalt.runs.settings_file import parsed


@dataclass(frozen=True)
class Participants:
    """The name of a federation and the ids of its clients, sorted."""

    name: str
    clients: tuple[str, ...]


class _Names(TypedDict):
    name: str
    clients: list[str]


@declared
class ServerPlace:
    """Where the server listens and keeps its files; relative paths are those of this file."""

    address: Annotated[str, setting("Where clients connect, host:port.")] = "127.0.0.1:8443"
    folder: Annotated[Path, setting("State of the server.", strict=False)] = Path("state")
    certificate: Annotated[Path, setting("Certificate of the server.", strict=False)] = Path(
        "server.crt"
    )
    key: Annotated[Path, setting("Private key of the server.", strict=False)] = Path("server.key")
    authority: Annotated[
        Path, setting("Certificate of the authority that signed it.", strict=False)
    ] = Path("ca.crt")
    clients: Annotated[Path, setting("Folder of the clients' public keys.", strict=False)] = Path(
        "clients"
    )
    insecure: Annotated[bool, setting("Do without encryption and keys.")] = False
    warn_below: Annotated[
        int, setting("Warn of fewer clients: what one receives tells too much about the others.")
    ] = 3
    keyless: Annotated[int, setting("Most connections that have not shown a key yet.")] = 256
    # Several clients may be behind one address.
    keyless_per_address: Annotated[int, setting("The same for one address.")] = 128

    def __post_init__(self) -> None:
        if not 1 <= self.keyless_per_address <= self.keyless:
            raise ValueError(
                f"keyless_per_address = {self.keyless_per_address} and keyless = {self.keyless}: "
                "expected at least 1, and no more of one address than in all"
            )
        _require_address("address", self.address)

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
        """The keys that are let in, for the gateway."""
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


@declared
class ClientPlace:
    """Who a client is, where its files lie and which server it calls."""

    name: Annotated[str, setting("Name of the client.")]
    server: Annotated[str, setting("Server to connect to, host:port.")]
    data: Annotated[Path, setting("Data of the client.", strict=False)] = Path("data")
    folder: Annotated[Path, setting("State of the client.", strict=False)] = Path("state")
    key: Annotated[Path, setting("Private key of the client.", strict=False)] = Path("client.key")
    authority: Annotated[
        Path, setting("Certificate of the authority of the server.", strict=False)
    ] = Path("ca.crt")
    model: Annotated[str | None, setting("Base model, if not where the agreement says.")] = None
    device: Annotated[str | None, setting("Device to compute on.")] = None
    insecure: Annotated[bool, setting("Do without encryption and keys.")] = False
    added: Annotated[bool, setting("Whether the client was added after the terms were agreed.")] = (
        False
    )

    def __post_init__(self) -> None:
        _require_address("server", self.server)


def read_server_place(file: Path, *, insecure: bool = False) -> tuple[ServerPlace, dict[str, Any]]:
    """The places of a federation.toml, and its other sections. Raises SettingsError."""
    table = _read_sections(file, {"server", "rules", "firewall"})
    place: ServerPlace = _place_of(ServerPlace, table.pop("server", {}), file, "server")
    return replace(place, insecure=insecure or place.insecure), table


def read_client_place(file: Path, *, insecure: bool = False) -> ClientPlace:
    """The places of a client.toml. Raises SettingsError."""
    table = _read_sections(file, {"client"})
    place: ClientPlace = _place_of(ClientPlace, table.get("client", {}), file, "client")
    return replace(place, insecure=insecure or place.insecure)


def read_participants(file: Path) -> Participants:
    """Who takes part, by a terms.toml of which nothing else is read. Raises SettingsError."""
    about = parsed(file).get("federation", {})
    try:
        names = {name: about[name] for name in _Names.__annotations__}
        require(names, _Names)
    except (FormError, KeyError, TypeError) as error:
        raise SettingsError(f"{file}: [federation]: expected name and clients: {error}") from None
    return Participants(names["name"], tuple(names["clients"]))


def _read_sections(file: Path, known: set[str]) -> dict[str, Any]:
    table = parsed(file)
    for section, value in table.items():
        if section in known and not isinstance(value, dict):
            raise SettingsError(f"{file}: [{section}]: expected a section, got {value!r}")
    if unknown := table.keys() - known:
        raise SettingsError(
            f"{file}: unknown section [{min(unknown)}]; expected {', '.join(sorted(known))}"
        )
    return table


def _require_address(key: str, address: str) -> None:
    try:
        require_address(address)
    except ValueError as error:
        raise ValueError(f"{key} = {error}") from None


def _place_of(cls: Any, table: dict[str, Any], file: Path, section: str) -> Any:
    """A section whose paths are relative to the file's folder."""
    hints = get_type_hints(cls)
    place = section_of(cls, table, str(file), section)
    root = file.absolute().parent
    paths = {name: root / getattr(place, name) for name, hint in hints.items() if hint is Path}
    return replace(place, **paths)
