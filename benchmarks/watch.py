"""The memory of a process and all that it has started, while it runs."""

import threading
from contextlib import suppress
from pathlib import Path


class Watch(threading.Thread):
    """Notes the most memory that a process and all that it has started hold together."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pids, self.peak, self.ended = {pid}, 0, threading.Event()

    def run(self) -> None:
        """Sample until it has ended; once found, a process counts even when its parent is gone."""
        while not self.ended.wait(0.1):
            parents = {}
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):  # ended meanwhile
                    after_name = stat.read_text().rpartition(")")[2].split()
                    parents[int(stat.parent.name)] = int(after_name[1])
            self.pids &= parents.keys()
            while more := {pid for pid, of in parents.items() if of in self.pids} - self.pids:
                self.pids |= more
            held = 0
            for pid in self.pids:
                with suppress(OSError):
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    held += int(text.partition("\nPss:")[2].split()[0])
            self.peak = max(self.peak, held)
