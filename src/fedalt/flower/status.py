"""How a federation's server stands, from its folder alone."""

import json
import time
from datetime import datetime

from fedalt.flower.config import ServerConfig
from fedalt.flower.serve import revoked


def shown(config: ServerConfig) -> str:
    """Rounds, nodes, last contacts and refused uploads, as a few lines of text."""
    folder, terms = config.place.run, config.terms
    file = folder / "status.json"
    if not file.exists():
        return f"{terms.name}: has not begun; no status in {folder}"
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
    lines += [f"    round {e['round']}, {e['client']}: {e['reason']}" for e in found[-5:]]
    return "\n".join(lines)
