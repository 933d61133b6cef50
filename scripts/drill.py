"""Disturb a federation of real processes in every way, and compare it with an undisturbed one.

    python scripts/drill.py             the long drill: 4 clients, 22 rounds; prints a table
    python scripts/drill.py --members   20 rounds in which clients come and go, and the server moves
    python scripts/drill.py --private   12 rounds of secure sums with noise and int8 downloads
    python scripts/drill.py --access    who is not let in, and what each attempt sees

Exits with 1 if a number differs, a state is lost, or a refusal is missing.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import machines as waits
import tomli_w
from access import attempts, not_refused
from drill_compared import compared, compared_members, compared_private
from drill_events import CLIENTS, Drill
from drill_members import ABOUT, FIRST, members_drill
from drill_private import PRIVATE, private_drill
from machines import Machines, Relay, found, wait_for
from runs_for_tests import save_model

from fedalt.runs.quarantine import refusals

ROUNDS = 22
FIREWALL = {"norm_limit": 100.0, "max_upload_bytes": 2**20}


def prepared(root: Path) -> tuple[Machines, Relay]:
    """A federation with a relay before client a, a small disk for c, and a d that means harm."""
    machines = found(
        root,
        save_model(root / "model"),
        CLIENTS,
        rounds={"rounds": ROUNDS},
        training={"local_epochs": 8},
    )
    relay = Relay(machines.address)
    mine = {"client": {"name": "a", "server": relay.address}}
    (machines.client("a") / "client.toml").write_text(tomli_w.dumps(mine))
    table = {"server": {"address": machines.address}, "firewall": FIREWALL}
    (machines.server / "federation.toml").write_text(tomli_w.dumps(table))
    script = Path(__file__).parents[1] / "tests" / "malicious.py"
    machines.commands["d"] = [str(script), str(machines.client("d") / "client.toml")]
    state = machines.client("c") / "state"
    state.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(state)], capture_output=True
    )
    return machines, relay


def long_drill(drill: Drill, relay: Relay) -> tuple[list[str], set[tuple[int, str]]]:
    """Everything that can happen, one after the other."""
    drill.begin()
    drill.hold()
    for kind in ("the app", "Flower's server", "the gateway", "fedalt server"):
        drill.kill_waiting(kind)
        drill.kill_aggregating(kind)
        drill.kill_between(kind)
    for when in ("while training", "while uploading", "between two rounds"):
        drill.kill_client("a", when)
    left_out = {(drill.fill_disk("c"), "c")}
    drill.stop_client("c")
    drill.cut(relay)
    drill.strangers()
    drill.power_cut()
    drill.damage_files()
    return drill.end(), left_out


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table for a document."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def access(root: Path) -> list[str]:
    """Try to get in without being let in; what is not as it should be."""
    machines = found(root, save_model(root / "model"), ("a", "b", "c"), rounds={"rounds": 2})
    try:
        machines.start("server")
        wait_for(lambda: "round 1" in machines.said("server"), "the server")
        tried = attempts(machines)
    finally:
        machines.kill_all()
    print(table(("attempt", "seen"), [(each.what, each.seen) for each in tried]))
    wrong: list[str] = not_refused(tried)
    return wrong


def everything(root: Path) -> list[str]:
    """Play the long drill; what is not as it should be."""
    machines, relay = prepared(root)
    drill = Drill(machines)
    try:
        with told(drill):
            problems, left_out = long_drill(drill, relay)
            return problems + compared(machines, root / "undisturbed", left_out)
    finally:
        subprocess.run(["umount", str(machines.client("c") / "state")], capture_output=True)


def members(root: Path) -> list[str]:
    """Play the drill of clients that come and go; what is not as it should be."""
    machines = found(root, save_model(root / "model"), FIRST, **ABOUT)
    drill = Drill(machines, pace="a")
    with told(drill):
        return members_drill(drill) + compared_members(machines, root / "undisturbed")


def private(root: Path) -> list[str]:
    """Play the drill of secure sums; what is not as it should be."""
    drill = Drill(found(root, save_model(root / "model"), CLIENTS, **PRIVATE))
    with told(drill):
        return private_drill(drill) + compared_private(drill.machines, root / "undisturbed")


@contextmanager
def told(drill: Drill) -> Iterator[None]:
    """Print tables of what was done and seen, however it ends; leave no process behind."""
    try:
        yield
    finally:
        drill.machines.kill_all()
        print(table(("round", "event", "seen", "outcome"), list(drill.rows)))
        refused = refusals(drill.machines.run)
        rows: list[tuple[object, ...]] = [(e["round"], e["client"], e["reason"]) for e in refused]
        print("\n" + table(("round", "client", "refused"), rows))
        print("\n" + table(("machine", "damaged file", "said"), list(drill.refusals)))


def main() -> None:
    """Run one of the four and print its table."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    words.add_argument("--access", action="store_true", help="who is not let in")
    words.add_argument("--members", action="store_true", help="clients come and go")
    words.add_argument("--private", action="store_true", help="secure sums, with noise")
    words.add_argument("--folder", type=Path, help="keep everything here")
    given = words.parse_args()
    root = (given.folder or Path(tempfile.mkdtemp(prefix="drill-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    waits.PATIENCE = 900.0  # seconds; the machine may be busy
    for number in (signal.SIGINT, signal.SIGTERM):  # whatever a shell has handed down
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    play = private if given.private else members if given.members else everything
    wrong = access(root) if given.access else play(root)
    well = "everything is as in the undisturbed federation"
    if given.access:
        well = "nobody was let in"
    print("\n" + ("\n".join(wrong) or well))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    if given.folder is None:
        shutil.rmtree(root)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
