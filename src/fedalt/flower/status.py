"""How a federation's server stands, from its folder alone."""

import json
import time
from collections import Counter
from datetime import datetime
from typing import Final

from fedalt.data.foreign import shown as one_line
from fedalt.flower.config import ServerConfig
from fedalt.flower.serve import revoked

_SHOWN: Final = 5  # lines of one sort


def shown(config: ServerConfig) -> str:
    """Rounds, nodes, last contacts and refused uploads, as a few lines of text."""
    folder, terms = config.place.run, config.terms
    file = folder / "status.json"
    if not file.exists():
        begun = f"{terms.name}: has not begun; no status in {folder}"
        return "\n".join(one_line(line) for line in [begun, *_refused_requests(config)])
    status = json.loads(file.read_text())
    ago = time.time() - status["time"]
    state = "has ended" if config.place.ended.exists() else f"seen {ago:.0f} seconds ago"
    done = min(status["round"], status["rounds"])
    lines = [f"{terms.name}: {done} of {status['rounds']} rounds done; the server {state}"]
    out = set(revoked(config))
    for client_id in terms.clients:
        here = "revoked" if client_id in out else "absent"
        if client_id in status["online"]:
            here = "online"
        waits = ", awaited" if client_id in status["awaited"] else ""
        heard = status["heard"].get(client_id)
        when = "never" if heard is None else f"{datetime.fromtimestamp(heard):%Y-%m-%d %H:%M:%S}"
        lines.append(f"  {client_id}: {here}{waits}; last answer {when}")
        if client_id in status["unable"]:
            lines.append(f"    it could not: {status['unable'][client_id]}")
    refused = folder / "refused.jsonl"
    found = (
        [json.loads(line) for line in refused.read_text().splitlines()] if refused.exists() else []
    )
    lines.append(f"  refused uploads: {len(found)}")
    lines += [f"    round {e['round']}, {e['client']}: {e['reason']}" for e in found[-_SHOWN:]]
    return "\n".join(one_line(line) for line in [*lines, *_refused_requests(config)])


def _refused_requests(config: ServerConfig) -> list[str]:
    """What the door has turned away since its log began; nothing where that is nothing."""
    log = config.place.logs / "door.log"
    written = log.read_text(errors="replace").splitlines() if log.exists() else []
    told = [json.loads(line) for line in written if line.startswith("{") and line.endswith("}")]
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
