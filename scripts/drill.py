"""Disturb a federation of real processes in every way, and compare it with an undisturbed one.

    python scripts/drill.py            the long drill: 4 clients, 22 rounds; prints a table
    python scripts/drill.py --access   who is not let in, and what each attempt sees

Exits with 1 if a number differs, a state is lost, or a refusal is missing.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tomli_w
from access import attempts
from drill_events import CLIENTS, Drill
from machines import Relay, Wire, assert_close, found, newest_state, wait_for
from malicious import PLAN, Malicious
from runs_for_tests import save_model, scores_of

from fedalt.engine.screening import Screening
from fedalt.federation.client import Client
from fedalt.federation.client_folder import open_client
from fedalt.federation.server_folder import open_server
from fedalt.flower.config import read_client_config, read_server_config
from fedalt.runs.quarantine import refusals

ROUNDS = 22
FIREWALL = {"norm_limit": 100.0, "max_upload_bytes": 2**20}


def prepared(root: Path) -> Drill:
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
    return Drill(machines, relay)


def long_drill(drill: Drill) -> tuple[list[str], set[tuple[int, str]]]:
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
    drill.cut()
    drill.strangers()
    drill.power_cut()
    drill.damage_files()
    return drill.end(), left_out


def compared(drill: Drill, root: Path, left_out: set[tuple[int, str]]) -> list[str]:
    """What differs from a run of the same host and members in one process, undisturbed."""
    machines = drill.machines
    config = read_server_config(machines.server / "federation.toml")

    def member(name: str) -> Client:
        place = read_client_config(machines.client(name) / "client.toml").place
        return open_client(config.terms, name, place.data, root / name, device="cpu")

    members = {name: member(name) for name in CLIENTS}
    wire = Wire({**members, "d": Malicious(members["d"], flood=False)}, left_out)
    gate = Screening(config.firewall)
    open_server(
        config.terms, root / "server", wire, config.rules, gate, lambda _: None
    ).to_the_end()

    wrong = []
    state = config.terms.settings.method.client_state
    for name in CLIENTS:
        file, drilled = newest_state(machines.client(name) / "state", name, state)
        undisturbed_file, undisturbed = newest_state(root / name, name, state)
        try:
            assert file == undisturbed_file, f"{file} and {undisturbed_file}"
            assert_close(drilled, undisturbed)
        except AssertionError as error:
            wrong.append(f"the state of {name} differs: {error}")
    counted, wanted = _counted(machines.run), _counted(root / "server")
    wrong += [f"{pair} counts in one of the two only" for pair in sorted(counted ^ wanted)]
    if _scores(machines.run).keys() != _scores(root / "server").keys():
        wrong.append("other scores are recorded")
    refused = {(e["round"], e["client"]): e["reason"] for e in refusals(machines.run)}
    for round_, (kind, reason) in PLAN.items():
        if kind != "flood" and not refused.pop((round_, "d"), "").startswith(reason):
            wrong.append(f"round {round_}: {kind} of d was not refused as it should be")
    return wrong + [f"{pair} was refused: {reason}" for pair, reason in refused.items()]


def _counted(run: Path) -> set[tuple[int, str]]:
    return {
        (line["round"], line["client"])
        for line in scores_of(run)
        if line["kind"] == "train" and line["column"] == "own" and "refused" not in line
    }


def _scores(run: Path) -> dict[tuple[str, int, str, str], object]:
    return {
        (line["split"], line["round"], line["client"], line["column"]): line["metrics"]
        for line in scores_of(run)
        if line["kind"] == "score"
    }


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table for a document."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def access_table(root: Path) -> str:
    """Who is not let in."""
    machines = found(root, save_model(root / "model"), ("a", "b", "c"), rounds={"rounds": 2})
    try:
        machines.start("server")
        wait_for(lambda: "round 0" in machines.said("server"), "the server")
        rows: list[tuple[object, ...]] = [(each.what, each.seen) for each in attempts(machines)]
    finally:
        machines.kill_all()
    return table(("attempt", "seen"), rows)


def main() -> None:
    """Run one of the two and print its table."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    words.add_argument("--access", action="store_true", help="who is not let in")
    words.add_argument("--folder", type=Path, help="keep everything here")
    given = words.parse_args()
    root = (given.folder or Path(tempfile.mkdtemp(prefix="drill-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.access:
        print(access_table(root))
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # whatever a shell has handed down
        signal.signal(number, signal.default_int_handler)
    drill = prepared(root)
    wrong: list[str] = []
    try:
        problems, left_out = long_drill(drill)
        wrong += problems + compared(drill, root / "undisturbed", left_out)
    finally:
        drill.machines.kill_all()
        print(table(("round", "event", "seen", "outcome"), list(drill.rows)))
        refused = refusals(drill.machines.run)
        rows: list[tuple[object, ...]] = [(e["round"], e["client"], e["reason"]) for e in refused]
        print("\n" + table(("round", "client", "refused"), rows))
        print("\n" + table(("machine", "damaged file", "said"), list(drill.refusals)))
        subprocess.run(["umount", str(drill.machines.client("c") / "state")], capture_output=True)
    print("\n" + ("\n".join(wrong) or "everything is as in the undisturbed federation"))
    if given.folder is None:
        shutil.rmtree(root)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
