"""How a federation's server stands, from its folder alone."""

import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import Final, TypedDict

from fedalt.core.foreign import shown as one_line
from fedalt.core.reading import FormError, StoreError, parse, read_bytes, read_json
from fedalt.federation.roster import UNCHANGED, Roster
from fedalt.federation.status_file import Status
from fedalt.flower.places import Participants, ServerPlace
from fedalt.flower.processes import is_running
from fedalt.flower.revocation import revoked
from fedalt.report.table import spent_privacy
from fedalt.runs.folder import RunFolder
from fedalt.runs.quarantine import refusals

_SHOWN: Final = 5  # lines of one sort


class _Refused(TypedDict):
    time: str
    what: str
    refused: int
    last_from: str | None


def shown(place: ServerPlace, federation: Participants, roster: Roster = UNCHANGED) -> str:
    """Rounds, nodes, last contacts and refused uploads, as a few lines of text. StoreError.

    `roster` is who was added and removed since the terms were agreed.
    """
    folder = place.run
    file = folder / "status.json"
    if not file.exists():
        begun = f"{federation.name}: has not begun; no status in {folder}"
        return "\n".join(one_line(line) for line in [begun, *_refused_requests(place)])
    status: Status = read_json(file, Status)
    ago, ended, runs = time.time() - status["time"], place.ended.exists(), _runs(place)
    state = f"seen {ago:.0f} seconds ago"
    if ended or not runs:
        state = "has ended" if ended else f"does not run; it was {state}"
    done = min(status["round"], status["rounds"])
    lines = [f"{federation.name}: {done} of {status['rounds']} rounds done; the server {state}"]
    if roster.version:
        lines.append(f"  members: version {roster.version}, after {_changes(roster)}")
    out, facts = set(revoked(place)), RunFolder(folder).facts()
    stays, gone = facts.get("stays", {}), {*facts.get("left", ())} - {*facts.get("revoked", ())}
    for client_id in roster.clients(federation.clients):
        online = runs and not ended and client_id in status["online"]
        state = "revoked" if client_id in out else "online" if online else "absent"
        stay = stays.get(client_id, {})
        if client_id in gone:
            state = f"left in round {stay['leaves'] + 1}" if "leaves" in stay else "left"
        elif client_id in roster.removed:
            state = "leaves in the next round"
        elif client_id in roster.added:
            since = f"round {stay['joins'] + 1}" if stay else "the next round"
            state += f", takes part from {since} on"
        waits = ", awaited" if client_id in status["awaited"] and not ended else ""
        heard = status["heard"].get(client_id)
        when = "never" if heard is None else f"{datetime.fromtimestamp(heard):%Y-%m-%d %H:%M:%S}"
        lines.append(f"  {client_id}: {state}{waits}; last answer {when}")
        if client_id in status["unable"] and not ended:
            lines.append(f"    it could not: {status['unable'][client_id]}")
    lines += [f"  {sentence}" for sentence in spent_privacy(RunFolder(folder).lines())]
    uploads = refusals(folder)
    lines.append(f"  refused uploads: {len(uploads)}")
    lines += [
        f"    round {e['round'] + 1}, {e['client']}: {e['reason']}" for e in uploads[-_SHOWN:]
    ]
    return "\n".join(one_line(line) for line in [*lines, *_refused_requests(place)])


def _changes(roster: Roster = UNCHANGED) -> str:
    names = {"adding": roster.added, "removing": roster.removed}
    return " and ".join(f"{what} {', '.join(who)}" for what, who in names.items() if who)


def _runs(place: ServerPlace) -> bool:
    """Whether the process is alive that calls clients."""
    with suppress(StoreError):
        return is_running(place.pid)
    return False


def _refused_requests(place: ServerPlace) -> list[str]:
    """What the gateway has turned away since its log began; [] where that is nothing."""
    log = place.logs / "gateway.log"
    lines = read_bytes(log).decode(errors="replace").splitlines() if log.exists() else []
    reports: list[_Refused] = []
    for line in lines:
        with suppress(FormError):  # a line of a library, or damaged
            reports.append(parse(line, _Refused))
    if not reports:
        return []
    counts: Counter[str] = Counter()
    for report in reports:
        counts[report["what"]] += report["refused"]
    last = next((line["last_from"] for line in reversed(reports) if line["last_from"]), "")
    sender = f", the last from {last}" if last else ""
    return [
        f"  refused requests: {counts.total()} since {reports[0]['time']}{sender}",
        *(f"    {count}: {what}" for what, count in counts.most_common(_SHOWN)),
    ]
