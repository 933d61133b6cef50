"""A server that was restored from a backup: a client that is ahead of it goes back to its round.

Only its owner can tell that from a server that lies, so a client goes back when it is told to. A
client keeps the states of its last accepted rounds for it. Nothing is lost: the states that
the server has forgotten lie in set-aside/, with the folders that they lay in.
"""

import shutil
from pathlib import Path
from typing import Final

from fedalt.core.files import make_private_folder
from fedalt.federation.accepted import Accepted
from fedalt.federation.call_checks import CallRefused
from fedalt.federation.messages import NEVER

KEPT: Final = 3  # accepted rounds whose states are kept: the last one, and two before it
SET_ASIDE: Final = "set-aside"


def last_rounds(accepted: Accepted, client_id: str, round_: int) -> list[int]:
    """The last rounds up to this one after which there are states, the newest last."""
    there = _rounds_of(accepted, client_id)
    return [*[known for known in there if known < round_][1 - KEPT :], round_]


def go_back(accepted: Accepted, client_id: str, round_: int) -> str:
    """Let a round be the last that counts; what to tell the owner. CallRefused without its state.

    Interrupted, it can be repeated.
    """
    there, before = _rounds_of(accepted, client_id), accepted.round
    if round_ != NEVER and round_ not in there:
        states = ", ".join(str(at + 1) for at in there) or "no round"
        raise CallRefused(
            f"client {client_id!r}: the server goes back to round {round_ + 1}, but this client "
            f"has the states of {states}; nothing was changed. Restore its folder from a backup of "
            "that time, or let the server's operator restore a newer one or take the client out"
        )
    digests = accepted.kept.digests
    newer = [file for file, _ in digests.files() if int(file.stem) > round_]
    for file in newer:
        copy = accepted.folder / SET_ASIDE / file.relative_to(accepted.folder)
        make_private_folder(copy.parent)
        shutil.copy(file, copy)
        digests.forget(file)
    accepted.write(round_)
    for file in newer:
        file.unlink(missing_ok=True)
    return (
        f"the server was set back; this client goes back from round {before + 1} to "
        f"{round_ + 1 or 'its start'} with it, and its newer states are in "
        f"{accepted.folder / SET_ASIDE}"
    )


def _rounds_of(accepted: Accepted, client_id: str) -> list[int]:
    folder = accepted.folder / "clients" / client_id
    return sorted(int(Path(name).stem) for name in accepted.kept.digests.names(folder))
