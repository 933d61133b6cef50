"""A federation's server and a client, opened from their configuration."""

from functools import partial
from pathlib import Path
from typing import Final

from fedalt.core.files import make_private_folder, open_private
from fedalt.core.foreign import shown
from fedalt.engine.screening import Gate
from fedalt.federation.client import Hear, Member, ignore, open_member
from fedalt.federation.owner_messages import Say, silent
from fedalt.federation.server import Host, open_host
from fedalt.federation.transport import Channel
from fedalt.flower.config import ClientConfig, ServerConfig
from fedalt.flower.revocation import record_revoked
from fedalt.runs.settings import SettingsError

_LINE: Final = 1000  # characters at most of a line, which may quote a client


def server_from(config: ServerConfig, channel: Channel) -> Host:
    """The server of a configuration over any channel; its folder is made if it is missing."""
    rounds = config.terms.settings.rounds
    gate = Gate(config.firewall, rounds.robust, rounds.trim)
    log = config.place.logs / "server.log"
    make_private_folder(log.parent)
    say = partial(_write_line, log)
    host = open_host(config.terms, config.place.run, channel, config.rules, gate, say)
    record_revoked(config)
    return host


def client_from(config: ClientConfig, hear: Hear = ignore, say: Say = silent) -> Member:
    """The client of a configuration, its model loaded and its data read; see `open_member`."""
    place = config.place
    try:
        return open_member(
            config.terms,
            place.name,
            place.data,
            place.folder,
            model=place.model,
            device=place.device,
            hear=hear,
            say=say,
        )
    except SettingsError as error:  # whose name and places are this file's
        raise SettingsError(f"{config.file}: {error}") from None


def _write_line(log: Path, text: str) -> None:
    """A line for the operator; `fedalt server` reads along."""
    with open_private(log, "a") as file:
        file.write(f"{shown(text, _LINE)}\n")
