"""Whose public keys lie in the clients' folder, also while somebody is copying them there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedalt.flower.config import ServerConfig
from fedalt.flower.credentials import pem_of
from fedalt.flower.revocation import REVOKED
from fedalt.runs.settings import SettingsError


def clients_by_key(config: ServerConfig) -> Mapping[str, str]:
    """Who is behind a public key, as Flower's server shows it.

    Raises SettingsError where a client has no usable key of its own and none was revoked.
    """
    keys = ClientKeys(config)
    clients = keys.now()
    if keys.troubles:
        raise SettingsError(min(keys.troubles))
    return clients


def key_text(key: str | bytes) -> str:
    """A public key of Flower's list of nodes, as text."""
    return key.decode() if isinstance(key, bytes) else key


@dataclass
class ClientKeys:
    """The keys of the clients' folder, read again whenever that has changed.

    What is not a whole key counts as not being there yet: the client's key of before goes on
    to count. That of a file that is gone does not, but may come back; `known` has it too.
    """

    config: ServerConfig
    known: dict[str, str] = field(default_factory=dict)  # public key by client
    troubles: frozenset[str] = frozenset()  # what is wrong with the folder, a sentence each
    strays: frozenset[str] = frozenset()  # keys of nobody
    _clients: Mapping[str, str] = field(default_factory=dict)
    _read_as: object = None  # what the folder was when it was read

    def now(self) -> Mapping[str, str]:
        """Who is behind a public key."""
        folder = self.config.place.clients
        state, clients = _state_of(folder), self.config.clients
        if (state, clients) != self._read_as:
            self._read_as = state, clients
            if isinstance(state, str):  # nobody's key is taken away by that
                self.troubles = frozenset({state})
            else:
                self._read(folder)
        return self._clients

    def _read(self, folder: Path) -> None:
        before, troubles, gone = dict(self.known), set(), set()
        for client_id in self.config.clients:
            file = folder / f"{client_id}.pub"
            if not file.exists():
                gone.add(client_id)
                if file.with_suffix(REVOKED).exists():
                    self.known.pop(client_id, None)
                else:
                    troubles.add(f"{file}: the public key of client {client_id!r} is missing")
                continue
            try:
                self.known[client_id] = pem_of(file)
            except SettingsError as error:
                troubles.add(str(error))
        troubles |= self._separate(folder, before)
        self._clients = {key: name for name, key in self.known.items() if name not in gone}
        self.troubles, self.strays = frozenset(troubles), _strays(self.config)

    def _separate(self, folder: Path, before: Mapping[str, str]) -> set[str]:
        """Give a key that two clients' files hold to the client that had it, or to the first."""
        owners: dict[str, str] = {}
        troubles = set()
        unchanged_first = sorted(self.known, key=lambda name: before.get(name) != self.known[name])
        for client_id in unchanged_first:
            owner = owners.setdefault(self.known[client_id], client_id)
            if owner == client_id:
                continue
            troubles.add(
                f"{folder / client_id}.pub: client {client_id!r} has the same key as client "
                f"{owner!r}; each needs its own"
            )
            del self.known[client_id]
            if (old := before.get(client_id)) is not None and old not in owners:
                self.known[client_id] = old
                owners[old] = client_id
        return troubles


def _strays(config: ServerConfig) -> frozenset[str]:
    """Public keys that are called after nobody; an editor's backups are called otherwise."""
    folder = config.place.clients
    names = {file.stem for file in folder.glob("[!.]*.pub")}
    return frozenset(
        f"{folder / name}.pub: no client is called {name!r}, so this key is not used"
        for name in names - set(config.clients)
    )


def _state_of(folder: Path) -> object:
    """What changes whenever a file of the folder does; a file may go while one looks."""
    files = []
    try:
        for file in folder.iterdir():
            stat = file.stat() if file.exists() else None
            files.append((file.name, stat and (stat.st_size, stat.st_ctime_ns, stat.st_ino)))
    except OSError as error:
        return f"{folder}: cannot be read: {error.strerror}"
    return sorted(files)
