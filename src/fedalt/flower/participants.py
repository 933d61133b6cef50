"""A federation's server and a client, opened from their configuration."""

from functools import partial
from pathlib import Path
from typing import Final

from fedalt.core.files import make_private_folder, open_private
from fedalt.core.foreign import shown
from fedalt.engine.firewall import Screening
from fedalt.federation.client import Client, OnEvent, ignore
from fedalt.federation.client_folder import open_client
from fedalt.federation.owner_messages import Say, silent
from fedalt.federation.server import Server
from fedalt.federation.server_folder import open_server
from fedalt.federation.transport import Transport
from fedalt.flower.config import ClientConfig, ServerConfig
from fedalt.flower.key_folder import PEERS, KeyFolder
from fedalt.flower.revocation import record_revoked
from fedalt.models.base import Base
from fedalt.runs.settings import SettingsError

_LINE: Final = 1000  # characters at most of a line, which may quote a client


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
        host = open_server(*place, config.rules, screening, say, config.roster, signatures)
    except SettingsError as error:  # whose rules are this file's
        raise SettingsError(f"{config.file}: {error}") from None
    record_revoked(config.place)
    return host


def client_from(
    config: ClientConfig,
    on_event: OnEvent = ignore,
    say: Say = silent,
    base: Base | None = None,
) -> Client:
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
            on_event=on_event,
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
