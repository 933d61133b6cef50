"""Whose public keys lie in the clients' folder, also while somebody is copying them there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedalt.flower.config import ServerConfig
from fedalt.flower.credentials import pem_of
from fedalt.runs.settings import SettingsError

REVOKED: Final = ".revoked"  # what a file's name ends in whose key was taken away


def clients_by_key(config: ServerConfig) -> Mapping[str, str]:
    """Who is behind a public key, as Flower's server shows it.

    Raises SettingsError where a client has no usable key of its own and none was revoked.
    """
    keys = ClientKeys(config)
    found = keys.now()
    if keys.troubles:
        raise SettingsError(min(keys.troubles))
    return found


@dataclass
class ClientKeys:
    """The keys of the clients' folder, read again whenever that has changed.

    What is not a whole key counts as not being there yet: the client's key of before goes on
    to count. That of a file that is gone does not, but may come back; `known` has it too.
    """

    config: ServerConfig
    known: dict[str, str] = field(default_factory=dict)  # public key by client
    troubles: frozenset[str] = frozenset()  # what is wrong with the folder, a sentence each
    strays: frozenset[str] = frozenset()  # what lies there and is no client's
    _found: Mapping[str, str] = field(default_factory=dict)
    _seen: object = None

    def now(self) -> Mapping[str, str]:
        """Who is behind a public key."""
        folder = self.config.place.clients
        if (seen := _standing(folder)) != self._seen:
            self._seen = seen
            if isinstance(seen, str):  # nobody's key is taken away by that
                self.troubles = frozenset({seen})
            else:
                self._read(folder)
        return self._found

    def _read(self, folder: Path) -> None:
        before, troubles, gone = dict(self.known), set(), set()
        for client_id in self.config.terms.clients:
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
        troubles |= self._apart(folder, before)
        self._found = {key: name for name, key in self.known.items() if name not in gone}
        self.troubles, self.strays = frozenset(troubles), _strays(self.config)

    def _apart(self, folder: Path, before: Mapping[str, str]) -> set[str]:
        """Give a key that two clients' files hold to the one that had it, or to the first."""
        owners: dict[str, str] = {}
        troubles = set()
        had = sorted(self.known, key=lambda each: before.get(each) != self.known[each])
        for client_id in had:
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
    names = {each.stem for each in folder.glob("[!.]*.pub")} if folder.is_dir() else set()
    return frozenset(
        f"{folder / name}.pub: no client is called {name!r}, so this key is not used"
        for name in names - set(config.terms.clients)
    )


def _standing(folder: Path) -> object:
    """What changes whenever a file of the folder does; one may go while one looks."""
    found = []
    try:
        for each in folder.iterdir():
            about = each.stat() if each.exists() else None
            found.append((each.name, about and (about.st_size, about.st_ctime_ns, about.st_ino)))
    except OSError as error:
        return f"{folder}: cannot be read: {error.strerror}"
    return sorted(found)
