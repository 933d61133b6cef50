"""Whom the operator has added to a federation, and whom taken out, since its terms were agreed.

members.json lies beside federation.toml. The terms stay as they are, and with them the digest in
every message: who takes part is no setting. A running server reads the file before each round.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, Final, TypedDict

from fedalt.core.files import atomic_write
from fedalt.core.reading import read_json
from fedalt.core.settings import Stay
from fedalt.engine.members import Members
from fedalt.runs.folder import RunFolder

if TYPE_CHECKING:  # `fedalt federation status` does without torch
    from fedalt.federation.agreement import Agreement

FILE: Final = "members.json"
_LOOK: Final = 1.0  # seconds between two looks whether anybody takes part

Say = Callable[[str], None]


class _Form(TypedDict):
    version: int
    added: list[str]
    removed: list[str]


@dataclass(frozen=True)
class Roster:
    """Names in the order of their changes; `version` counts the changes."""

    version: int = 0
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def clients(self, agreed: Sequence[str]) -> tuple[str, ...]:
        """Everyone who ever takes part, sorted; `agreed` are the clients of the terms."""
        return tuple(sorted({*agreed, *self.added}))


UNCHANGED: Final = Roster()


def read_roster(file: Path) -> Roster:
    """What a members.json says; without one nothing was changed. Raises StoreError."""
    if not file.exists():
        return UNCHANGED
    raw = read_json(file, _Form)
    return Roster(raw["version"], tuple(raw["added"]), tuple(raw["removed"]))


def write_roster(file: Path, roster: Roster) -> None:
    """Replace a members.json."""
    atomic_write(file, (json.dumps(asdict(roster), indent=2) + "\n").encode())


def members_of(folder: RunFolder) -> Members:
    """Who has taken part in which round of a federation up to now."""
    facts = folder.facts()
    stays = {name: Stay(**stay) for name, stay in facts.get("stays", {}).items()}
    return Members(sorted(facts["clients"]), stays)


def update_members(
    folder: RunFolder, file: Path | None, agreement: "Agreement", round_: int, say: Say
) -> Members:
    """Let in and take out, before a round, whom the operator has named since the last one.

    Whoever is named later, while the round goes on, is so in the next one. Repeated after a crash
    it changes nothing.
    """
    roster = UNCHANGED if file is None else read_roster(file)
    folder.change_facts(partial(_changes, roster, agreement, round_, say))
    return members_of(folder)


def members_there(
    folder: RunFolder, file: Path | None, agreement: "Agreement", round_: int, say: Say
) -> Members:
    """Who takes part in a round that begins, as `update_members` does; somebody has to."""
    wait_for_anyone(folder, say, partial(update_members, folder, file, agreement, round_, say))
    return members_of(folder)


def wait_for_anyone(folder: RunFolder, say: Say, look: Callable[[], object] = dict) -> None:
    """Wait while nobody takes part, as while all keys are revoked; `look` lets newcomers in.

    Rounds without anyone would bring the end nearer, and nothing else.
    """
    look()
    if _somebody(folder):
        return
    say(
        "nobody takes part; this waits until somebody does, see `fedalt federation rotate-key` "
        "and `add`"
    )
    while not _somebody(folder):
        sleep(_LOOK)
        look()


def _somebody(folder: RunFolder) -> bool:
    return bool(folder.facts()["clients"].keys() - folder.left())


def _changes(
    roster: Roster, agreement: "Agreement", round_: int, say: Say, facts: Mapping[str, Any]
) -> dict[str, object]:
    """What of a run's facts is another one, as a roster says."""
    clients, stays = dict(facts["clients"]), dict(facts.get("stays", {}))
    revoked = set(facts.get("revoked", ()))
    left = set(facts.get("left", ())) - revoked
    for name in roster.added:
        if name not in clients and name not in roster.removed:
            clients[name], stays[name] = {}, {"joins": round_}
            say(f"round {round_ + 1}: {name} takes part from now on")
    for name in roster.removed:
        if name not in clients or name in left:
            continue
        left.add(name)
        if stays.get(name, {}).get("joins", 0) == round_:  # it has taken part in no whole round
            del clients[name]
            stays.pop(name, None)
            continue
        stays[name] = {**stays.get(name, {}), "leaves": round_}
        say(f"round {round_ + 1}: {name} has left; {what_stays(agreement)}")
    now: dict[str, object] = {
        "clients": clients,
        "stays": stays,
        "left": sorted(left | revoked),
        "revoked": sorted(revoked - left),
    }
    if all(facts.get(key, type(value)()) == value for key, value in now.items()):
        return {}
    return now


def what_stays(agreement: "Agreement") -> str:
    """What becomes of a leaver's part in the server's state, in a clause."""
    method = agreement.settings.method
    if method.without(method.init_server(agreement.init), "") is None:
        return "the method stores only averages, so what it has contributed stays in them"
    if getattr(method, "mingled", False):
        return "its last upload no longer counts, but what others' adapters have of it stays"
    return "its last upload is subtracted from what the server sends"
