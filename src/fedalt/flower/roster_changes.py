"""`fedalt federation add`, `remove` and `rotate-key`, also while the server runs."""

from collections.abc import Sequence
from pathlib import Path

from fedalt.core.files import make_private_folder
from fedalt.data.names import fault_of_names
from fedalt.federation.roster import Roster, read_roster, what_stays, write_roster
from fedalt.flower.config import ServerConfig
from fedalt.flower.credentials import make_client_key
from fedalt.flower.init import write_client
from fedalt.flower.revocation import REVOKED, record_revoked
from fedalt.runs.folder import locked
from fedalt.runs.settings import SettingsError
from fedalt.runs.together import fault_of_leaving


def add_clients(config: ServerConfig, names: Sequence[str]) -> list[Path]:
    """Make newcomers' folders and let them in; the folders. Raises SettingsError, StoreError.

    They take part from the next round on.
    """
    with locked(config.place.clients):
        roster, known = read_roster(config.roster), config.clients
        if fault := fault_of_names([*known, *names]):
            raise SettingsError(fault)
        if config.terms.settings.privacy.unit == "client":
            raise SettingsError(
                f"{config.terms.name!r} has [privacy] unit = 'client', whose ledger counts the "
                "clients of its terms alone; nobody can be added"
            )
        if config.terms.settings.privacy.secure_sum:
            raise SettingsError(
                f"{config.terms.name!r} has [privacy] secure_sum, for which its clients have each "
                "other's keys from the beginning; nobody can be added"
            )
        for name in names:
            if name in known or names.count(name) > 1:
                gone = " and was removed" if name in roster.removed else ""
                raise SettingsError(
                    f"client {name!r} is in {config.terms.name!r} already{gone}; expected new names"
                )
        places = [place_of(config, name) for name in names]
        for place in places:
            if place.exists():
                raise SettingsError(
                    f"{place} exists already, and a newcomer's folder is a new one; where `add` "
                    "was cut short, delete it"
                )
        for place in places:
            server, address = config.file.parent, config.place.address
            write_client(place, server, config.terms, address, config.place.clients, added=True)
        _write(config, roster, added=names)  # from now on the keys are those of somebody
    return places


def remove_client(config: ServerConfig, name: str) -> str:
    """Take a client out for good; what becomes of its part. Raises SettingsError, StoreError.

    It is shut out at once. Its part is taken out when the next round begins.
    """
    with locked(config.place.clients):
        roster = read_roster(config.roster)
        _require_member(config, roster, name)
        settings = config.terms.settings
        if fault := fault_of_leaving(settings.privacy, settings.traffic):
            raise SettingsError(
                f"client {name!r} cannot be removed: {fault}; revoke its key instead"
            )
        if not set(config.clients) - {*roster.removed, name}:
            raise SettingsError(f"client {name!r} is the last one; a federation has at least one")
        key = config.place.clients / f"{name}.pub"
        if key.exists():
            key.rename(key.with_suffix(REVOKED))
        record_revoked(config.place)
        _write(config, roster, removed=[name])  # last, so that it can be repeated if cut short
    return what_stays(config.terms)


def rotate_key(config: ServerConfig, name: str) -> Path:
    """Make a new key for a client, which alone is let in from now on; the file to send it.

    Raises SettingsError, StoreError.
    """
    with locked(config.place.clients):
        _require_member(config, read_roster(config.roster), name)
        secret = place_of(config, name) / "client.key"
        make_private_folder(secret.parent)
        make_client_key(secret, config.place.clients / f"{name}.pub")
        record_revoked(config.place)
    return secret


def place_of(config: ServerConfig, name: str) -> Path:
    """Where a client's folder is made: where `fedalt federation init` would have made it."""
    return config.file.parent.parent / "clients" / name


def _require_member(config: ServerConfig, roster: Roster, name: str) -> None:
    members = sorted(set(config.clients) - set(roster.removed))
    if name not in members:
        raise SettingsError(
            f"client {name!r} does not take part in {config.terms.name!r}; there are "
            f"{', '.join(members)}"
        )


def _write(
    config: ServerConfig, roster: Roster, added: Sequence[str] = (), removed: Sequence[str] = ()
) -> None:
    changes = (*roster.added, *added), (*roster.removed, *removed)
    write_roster(config.roster, Roster(roster.version + 1, *changes))
