"""Strangers without a key at a federation of real processes: their cost, and whom they lock out.

    python scripts/flood.py [--each 50] [--addresses 1] [--folder DIR]

A server and three clients run on loopback; after the first round so many strangers of each of ten
kinds come (tests/floods.py), and again whenever they were dropped, until the federation has ended.
Prints what the server's processes hold before and at most, and exits with 1 if they grew by 100 MB
or more, or a client did not finish. Stops by itself; nothing leaves this machine.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx
import psutil
from floods import KINDS, Flood, seconds_to_greet
from machines import Machines, found
from runs_for_tests import save_model

from fedalt.flower.config import read_server_config
from fedalt.flower.places import read_participants
from fedalt.flower.status import shown

CLIENTS = ("a", "b", "c")
ROUNDS = 12
MOST = 100.0  # MB
LONGEST = 900.0  # seconds, whatever happens
WAVE = 15.0  # seconds until strangers that were dropped come again


@dataclass
class Watch:
    """What processes hold, looked at again and again: the sum of each look at its highest."""

    parts: dict[str, psutil.Process]
    begin: dict[str, tuple[float, float]] = field(default_factory=dict)  # RSS and USS in MB
    most: dict[str, tuple[float, float]] = field(default_factory=dict)
    sums: list[tuple[float, float]] = field(default_factory=list)

    def look(self) -> None:
        """Look once."""
        now = {name: _held(each) for name, each in self.parts.items()}
        self.begin = self.begin or now
        for name, (rss, uss) in now.items():
            before = self.most.get(name, (0.0, 0.0))
            self.most[name] = max(before[0], rss), max(before[1], uss)
        self.sums.append((sum(r for r, _ in now.values()), sum(u for _, u in now.values())))

    def growth(self) -> tuple[float, float]:
        """How much the sum has grown at most: RSS and USS."""
        first = self.sums[0]
        return max(r for r, _ in self.sums) - first[0], max(u for _, u in self.sums) - first[1]

    def table(self) -> str:
        """For a document."""
        lines = [
            "| process | RSS before | at most | USS before | at most |",
            "|---|---|---|---|---|",
        ]
        for name, (rss, uss) in self.begin.items():
            most = self.most[name]
            lines.append(f"| {name} | {rss:.0f} | {most[0]:.0f} | {uss:.0f} | {most[1]:.0f} |")
        rss, uss = self.growth()
        return "\n".join([*lines, f"| growth of the sum, at most | | {rss:.0f} | | {uss:.0f} |"])


def _held(process: psutil.Process) -> tuple[float, float]:
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0.0, 0.0
    return info.rss / 1e6, info.uss / 1e6


def parts_of(machines: Machines) -> dict[str, psutil.Process]:
    """The server's processes."""
    return {
        "gateway": machines.gateway(),
        "Flower's server": machines.superlink(),
        "Flower's starter of apps": machines.find("flower-superexec"),
        "app": machines.app(),
    }


def pour(flood: Flood, each: int, ended: Callable[[], bool]) -> None:
    """Keep so many strangers of each kind at the gateway until the federation has ended."""
    while not ended():
        for _ in range(each):
            for kind in KINDS:
                if ended():
                    return
                flood.send(kind, 1)
        end = time.monotonic() + WAVE
        while not ended() and time.monotonic() < end:
            time.sleep(0.2)
        flood.close()


def flooded_federation(root: Path, each: int, addresses: int) -> int:
    """The exit code; prints what was seen."""
    sections = {"rounds": {"rounds": ROUNDS}, "training": {"local_epochs": 8}}
    machines = found(root, save_model(root / "model"), CLIENTS, **sections)
    began, everyone = time.monotonic(), ("server", *CLIENTS)
    sources = [f"127.0.0.{number}" for number in range(1, addresses + 1)]

    def ended() -> bool:
        is_late = time.monotonic() - began > LONGEST
        return is_late or machines.started["server"].poll() is not None

    try:
        for name in everyone:
            machines.start(name)
        machines.wait_for_round(1)
        watch, waits, missed = Watch(parts_of(machines)), [], []
        watch.look()
        first = machines.rounds_done()
        flood = Flood(machines.address, machines.server / "ca.crt", sources)
        came = flood.tried
        thread = threading.Thread(target=pour, args=(flood, each, ended))
        thread.start()
        while not ended():
            watch.look()
            try:
                waits.append(seconds_to_greet(machines.address, machines.server / "ca.crt"))
            except httpx.TransportError as error:  # as where the federation has just ended
                missed.append(str(error))
            time.sleep(0.5)
        thread.join()
        flood.close()
        codes = machines.wait_for_end(everyone) if machines.rounds_done() == ROUNDS else {}
    finally:
        machines.kill_all()
    rss, uss = watch.growth()
    print(f"{each} strangers of each of {len(KINDS)} kinds at a time, from {addresses} addresses\n")
    print(watch.table())
    print(f"\nstrangers who came: {sum(came.values())}")
    print(f"rounds before: {first}, at the end: {machines.rounds_done()} of {ROUNDS}")
    print(f"exit codes: {codes}")
    print(f"{len(waits)} newcomers waited for a greeting at most {max(waits, default=0):.1f} s")
    print(f"{len(missed)} were not greeted: {sorted(set(missed))}")
    config = read_server_config(machines.server / "federation.toml")
    print(shown(config.place, read_participants(machines.server / "terms.toml")))
    return int(max(rss, uss) >= MOST or codes != dict.fromkeys(everyone, 0))


def main() -> None:
    """Run it once and clean up."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    words.add_argument("--each", type=int, default=50, choices=range(1, 201), metavar="1-200")
    words.add_argument("--addresses", type=int, default=1, choices=range(1, 251), metavar="1-250")
    words.add_argument("--folder", type=Path, help="keep everything here")
    given = words.parse_args()
    root = (given.folder or Path(tempfile.mkdtemp(prefix="flood-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    code = flooded_federation(root, given.each, given.addresses)
    if given.folder is None:
        shutil.rmtree(root)
    sys.exit(code)


if __name__ == "__main__":
    main()
