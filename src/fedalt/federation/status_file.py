"""status.json of a federation's server: who is there, who is awaited, who was heard when."""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

from fedalt.core.files import atomic_write
from fedalt.core.reading import StoreError, read_json

_SHOWN: Final = 1.0  # seconds between two files that say the same


class Status(TypedDict):
    """What the file holds; times are seconds of the epoch."""

    round: int
    rounds: int
    online: list[str]
    awaited: list[str]
    heard: dict[str, float]
    unable: dict[str, str]
    time: float


@dataclass
class StatusFile:
    """What `fedalt federation status` reads, of a run of so many rounds."""

    path: Path
    rounds: int
    _shown: tuple[float, object] = (0.0, None)

    def show(
        self,
        round_: int,
        heard: Mapping[str, float],
        online: Collection[str],
        awaited: Collection[str],
        unable: Mapping[str, str],
    ) -> None:
        """Write it, unless that was done a moment ago and nothing has happened since."""
        now, news = time.monotonic(), (set(online), set(awaited), set(unable))
        if news == self._shown[1] and now - self._shown[0] < _SHOWN:
            return
        self._shown = now, news
        status: Status = {
            "round": round_,
            "rounds": self.rounds,
            "online": sorted(online),
            "awaited": sorted(awaited),
            "heard": dict(heard),
            "unable": dict(unable),
            "time": time.time(),
        }
        atomic_write(self.path, json.dumps(status).encode())

    def heard(self) -> dict[str, float]:
        """When each client was heard last, as an earlier round or server has shown it."""
        try:
            status: Status = read_json(self.path, Status)
        except StoreError:
            return {}  # nobody needs it but who looks; it is written anew
        return status["heard"]
