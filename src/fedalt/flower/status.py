"""How a federation's server stands, from its folder alone."""

import time
from collections import Counter
from datetime import datetime
from typing import Final, TypedDict

import psutil
from psutil import STATUS_ZOMBIE as ZOMBIE

from fedalt.core.foreign import shown as one_line
from fedalt.core.reading import FormError, parse, read_bytes, read_json
from fedalt.flower.config import ServerConfig
from fedalt.flower.serve import revoked
from fedalt.runs.quarantine import refusals

_SHOWN: Final = 5  # lines of one sort


class _Status(TypedDict):
    round: int
    rounds: int
    online: list[str]
    awaited: list[str]
    heard: dict[str, float]
    unable: dict[str, str]
    time: float


class _Told(TypedDict):
    time: str
    what: str
    refused: int
    last_from: str | None


def shown(config: ServerConfig) -> str:
    """Rounds, nodes, last contacts and refused uploads, as a few lines of text. StoreError."""
    folder, terms = config.place.run, config.terms
    file = folder / "status.json"
    if not file.exists():
        begun = f"{terms.name}: has not begun; no status in {folder}"
        return "\n".join(one_line(line) for line in [begun, *_refused_requests(config)])
    status: _Status = read_json(file, _Status)
    ago, ended, runs = time.time() - status["time"], config.place.ended.exists(), is_running(config)
    state = f"seen {ago:.0f} seconds ago"
    if ended or not runs:
        state = "has ended" if ended else f"does not run; it was {state}"
    done = min(status["round"], status["rounds"])
    lines = [f"{terms.name}: {done} of {status['rounds']} rounds done; the server {state}"]
    out = set(revoked(config))
    for client_id in terms.clients:
        there = runs and not ended and client_id in status["online"]
        here = "revoked" if client_id in out else "online" if there else "absent"
        waits = ", awaited" if client_id in status["awaited"] and not ended else ""
        heard = status["heard"].get(client_id)
        when = "never" if heard is None else f"{datetime.fromtimestamp(heard):%Y-%m-%d %H:%M:%S}"
        lines.append(f"  {client_id}: {here}{waits}; last answer {when}")
        if client_id in status["unable"] and not ended:
            lines.append(f"    it could not: {status['unable'][client_id]}")
    found = refusals(folder)
    lines.append(f"  refused uploads: {len(found)}")
    lines += [f"    round {e['round']}, {e['client']}: {e['reason']}" for e in found[-_SHOWN:]]
    return "\n".join(one_line(line) for line in [*lines, *_refused_requests(config)])


def is_running(config: ServerConfig) -> bool:
    """Whether the process is alive that calls clients; its number may be another's by now."""
    try:
        process = psutil.Process(int(config.place.pid.read_text()))
        written = config.place.pid.stat().st_mtime
        return bool(process.create_time() <= written + 1 and process.status() != ZOMBIE)
    except (OSError, ValueError, psutil.Error):
        return False


def _refused_requests(config: ServerConfig) -> list[str]:
    """What the door has turned away since its log began; nothing where that is nothing."""
    log = config.place.logs / "door.log"
    written = read_bytes(log).decode(errors="replace").splitlines() if log.exists() else []
    told = [line for text in written if (line := _told(text)) is not None]
    if not told:
        return []
    counts: Counter[str] = Counter()
    for each in told:
        counts[each["what"]] += each["refused"]
    last = next((each["last_from"] for each in reversed(told) if each["last_from"]), "")
    come = f", the last from {last}" if last else ""
    return [
        f"  refused requests: {counts.total()} since {told[0]['time']}{come}",
        *(f"    {count}: {what}" for what, count in counts.most_common(_SHOWN)),
    ]


def _told(text: str) -> _Told | None:
    """A line of the door's log that counts requests; others are of the libraries, or damaged."""
    try:
        found: _Told = parse(text, _Told)
    except FormError:
        return None
    return found
