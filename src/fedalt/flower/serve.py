"""A federation's server from its files, over whatever channel."""

from functools import partial
from pathlib import Path
from typing import Final

from fedalt.core.files import make_private_folder, open_private
from fedalt.core.foreign import shown
from fedalt.data.names import is_safe
from fedalt.engine.screening import Screening
from fedalt.federation.server import Server, open_server
from fedalt.federation.transport import Transport
from fedalt.flower.client_keys import REVOKED
from fedalt.flower.config import ServerConfig
from fedalt.runs.folder import RunFolder
from fedalt.runs.settings import SettingsError

_LONGEST: Final = 1000  # characters of a line, which may quote a client


def host_of(config: ServerConfig, channel: Transport) -> Server:
    """The server of a configuration; its folder is made if it is not there."""
    rounds = config.terms.settings.rounds
    gate = Screening(config.firewall, rounds.robust, rounds.trim)
    log = config.place.logs / "server.log"
    make_private_folder(log.parent)
    say = partial(_write, log)
    host = open_server(config.terms, config.place.run, channel, config.rules, gate, say)
    _take_out(config)
    return host


def revoke_key(config: ServerConfig, client_id: str) -> None:
    """Take a client's key away; who runs the server looks for that."""
    file = config.place.clients / f"{client_id}.pub"
    if not is_safe(client_id) or not file.exists():
        there = ", ".join(sorted(each.stem for each in config.place.clients.glob("*.pub")))
        raise SettingsError(f"client {client_id!r} has no key here; there are {there or 'none'}")
    file.rename(file.with_suffix(REVOKED))
    _take_out(config)


def revoked(config: ServerConfig) -> list[str]:
    """The clients whose keys were taken away and that have got no other."""
    taken = config.place.clients.glob(f"*{REVOKED}")
    return sorted(each.stem for each in taken if not each.with_suffix(".pub").exists())


def _take_out(config: ServerConfig) -> None:
    """Note in the run who takes part no more, so that no round waits for them.

    A client that has got another key takes part again, one that has left by itself does not.
    """
    folder, out = RunFolder(config.place.run), frozenset(revoked(config))
    if not (folder.path / "run.json").exists():
        return
    by_key = frozenset(folder.facts().get("revoked", ()))
    others = folder.left() - by_key
    if out != by_key:
        folder.add_facts({"left": sorted(others | out), "revoked": sorted(out - others)})


def _write(log: Path, text: str) -> None:
    """A line for the operator; `fedalt server` reads along."""
    with open_private(log, "a") as file:
        file.write(f"{shown(text, _LONGEST)}\n")
