"""Clients whose keys the operator has taken away."""

from collections.abc import Mapping
from typing import Any, Final

from fedalt.data.names import is_safe
from fedalt.flower.places import ServerPlace
from fedalt.runs.folder import RunFolder
from fedalt.runs.settings import SettingsError

REVOKED: Final = ".revoked"  # suffix of a public key that was taken away


def revoke_key(place: ServerPlace, client_id: str) -> None:
    """Take a client's key away; a running server notices. Raises SettingsError.

    Done again, it ends what was cut short.
    """
    file = place.clients / f"{client_id}.pub"
    taken = file.with_suffix(REVOKED)
    if not is_safe(client_id) or not (file.exists() or taken.exists()):
        names = ", ".join(sorted(key.stem for key in place.clients.glob("*.pub")))
        raise SettingsError(f"client {client_id!r} has no key here; there are {names or 'none'}")
    if file.exists():
        file.rename(taken)
    record_revoked(place)


def revoked(place: ServerPlace) -> list[str]:
    """The clients whose keys were taken away and that have got no other."""
    keys = place.clients.glob(f"*{REVOKED}")
    return sorted(key.stem for key in keys if not key.with_suffix(".pub").exists())


def record_revoked(place: ServerPlace) -> None:
    """Note in the run who takes part no more, so that no round waits for them.

    A client that has got another key takes part again, one that has left by itself does not.
    """
    run = RunFolder(place.run)
    if not (run.path / "run.json").exists():
        return

    def change(facts: Mapping[str, Any]) -> Mapping[str, object]:
        now, before = frozenset(revoked(place)), frozenset(facts.get("revoked", ()))
        others = frozenset(facts.get("left", ())) - before
        if now == before:
            return {}
        return {"left": sorted(others | now), "revoked": sorted(now - others)}

    run.change_facts(change)
