"""How a federation's server stands, from its folder alone."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psutil
from psutil import STATUS_ZOMBIE as ZOMBIE

from fedalt.data.foreign import shown as one_line
from fedalt.flower.config import ServerConfig
from fedalt.flower.serve import revoked
from fedalt.store import StoreError

_SHOWN: Final = 5  # lines of one sort


def shown(config: ServerConfig) -> str:
    """Rounds, nodes, last contacts and refused uploads, as a few lines of text."""
    folder, terms = config.place.run, config.terms
    file = folder / "status.json"
    if not file.exists():
        begun = f"{terms.name}: has not begun; no status in {folder}"
        return "\n".join(one_line(line) for line in [begun, *_refused_requests(config)])
    status = _read(file)
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
    refused = folder / "refused.jsonl"
    found = (
        [json.loads(line) for line in refused.read_text().splitlines()] if refused.exists() else []
    )
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


def _read(file: Path) -> Mapping[str, Any]:
    """What the server has shown last. Raises StoreError."""
    try:
        status: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: cannot be read: {error}") from None
    return status


def _refused_requests(config: ServerConfig) -> list[str]:
    """What the door has turned away since its log began; nothing where that is nothing."""
    log = config.place.logs / "door.log"
    written = log.read_text(errors="replace").splitlines() if log.exists() else []
    told = [found for line in written if (found := _refusals(line))]
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


def _refusals(line: str) -> Mapping[str, Any]:
    """What a line of the door's log counts; nothing where it is another one, or cut off."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"what", "refused"} <= found.keys() else {}
