"""Disturb a federation of real processes in every way, and compare it with an undisturbed one.

    python scripts/drill.py            the long drill: 4 clients, 21 rounds; prints a table
    python scripts/drill.py --access   who is not let in, and what each attempt sees

Exits with 1 if a number differs, a state is lost, or a refusal is missing.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
import tomli_w
from access import attempts
from floods import KINDS, flooded
from machines import Machines, Relay, Wire, assert_close, found, kill, newest_state, wait_for
from malicious import PLAN, Malicious
from runs_for_tests import save_model, scores_of

from fedalt.engine.screening import Screening
from fedalt.federation.client import Client, open_client
from fedalt.federation.server import open_server
from fedalt.flower.config import read_client_config, read_server_config
from fedalt.runs.quarantine import refusals

CLIENTS = ("a", "b", "c", "d")
ROUNDS = 21
STRANGERS = 20  # of each kind
CUT = 75.0  # seconds without a network; Flower counts a client as gone after 60
FIREWALL = {"norm_limit": 100.0, "max_upload_bytes": 2**20}


@dataclass
class Drill:
    """The machines, what was done to them, and what was seen of it.

    Client b sets the pace: while it is stopped, no round ends.
    """

    machines: Machines
    relay: Relay
    rows: list[tuple[int, str, str, str]] = field(default_factory=list)

    def begin(self) -> None:
        """Start everybody and wait for the first round."""
        self.machines.start("server")
        for each in CLIENTS:
            self.machines.start(each)
        self.machines.wait_for_round(1)

    def hold(self) -> None:
        """Let no round end."""
        self.machines.process("b").suspend()

    def go(self) -> None:
        """Let rounds end."""
        self.machines.process("b").resume()

    @contextmanager
    def event(self, what: str, *whom: str) -> Iterator[int]:
        """Do something to a client in a round, which then has to end; the number of the round."""
        there, round_ = self.machines, self.machines.rounds_done()
        before = {name: len(there.said(name)) for name in ("server", *CLIENTS)}
        began = time.monotonic()
        print(f"round {round_}: {what}", file=sys.stderr, flush=True)
        yield round_
        self.go()
        there.wait_for_round(round_ + 1)
        self.hold()
        seen = [
            line.strip()
            for name, at in before.items()
            for line in there.said(name)[at:].splitlines()
            if any(word in line for word in SIGNS) and name in ("server", *whom)
        ]
        outcome = f"counted after {time.monotonic() - began:.0f} s"
        self.rows.append((round_, what, "; ".join(_short(seen)), outcome))

    def kill_waiting(self, kind: str) -> None:
        """Kill a part of the server while it waits for b."""
        with self.event(f"{kind} killed while clients are waited for") as round_:
            self._wait_for_others(round_)
            self._kill(kind)

    def kill_aggregating(self, kind: str) -> None:
        """Kill a part of the server as soon as the last answer is there."""
        with self.event(f"{kind} killed while aggregating") as round_:
            self._wait_for_others(round_)
            victim = self._victim(kind)
            folder = self.machines.run / "incoming" / f"{round_:04d}" / "b.bin"
            self.go()
            while not folder.exists() and self.machines.rounds_done() == round_:
                time.sleep(0.0005)
            self._kill(kind, victim)

    def kill_between(self, kind: str) -> None:
        """Kill a part of the server as soon as a round counts."""
        with self.event(f"{kind} killed between two rounds") as round_:
            victim = self._victim(kind)
            self.go()
            while self.machines.rounds_done() == round_:
                time.sleep(0.0005)
            self._kill(kind, victim)

    def _wait_for_others(self, round_: int) -> None:
        wanted = sorted(set(CLIENTS) - {"b"})
        there = self.machines
        there.wait_for(lambda: set(wanted) <= set(there.answered(round_)), "the others' answers")

    def _victim(self, kind: str) -> psutil.Process:
        there = self.machines
        find: dict[str, Callable[[], psutil.Process]] = {
            "the app": there.app,
            "Flower's server": there.superlink,
            "the door": there.door,
            "fedalt server": lambda: there.process("server"),
        }
        return find[kind]()

    def _kill(self, kind: str, victim: psutil.Process | None = None) -> None:
        there, sign = self.machines, BACK[kind]
        before = there.said("server").count(sign)
        kill(victim or self._victim(kind))
        self.hold()  # or rounds go by while it comes back
        if kind == "fedalt server":
            there.started["server"].wait()
            there.start("server")
        there.wait_for(lambda: there.said("server").count(sign) > before, f"{kind} again")

    def kill_client(self, name: str, when: str) -> None:
        """Kill a client at some moment of its round, and start it again."""
        there = self.machines
        with self.event(f"client {name} killed {when}", name) as round_:
            state = there.client(name) / "state"
            if when == "between two rounds":
                there.wait_for(lambda: name in there.answered(round_), "its answer")
            elif when == "while training":  # the first thing it does with a call
                told = state / "accepted.json"
                there.wait_for(
                    lambda: json.loads(told.read_text())["accepted"] == round_ - 1, "its call"
                )
            else:
                kept = state / "answer.bin"
                old = kept.stat().st_mtime_ns
                while kept.stat().st_mtime_ns == old and name not in there.answered(round_):
                    time.sleep(0.0005)
            kill(there.process(name))
            there.started[name].wait()
            there.start(name)

    def stop_client(self, name: str) -> None:
        """End a client politely, and start it again."""
        with self.event(f"client {name} ended with SIGTERM", name):
            self.machines.started[name].send_signal(signal.SIGTERM)
            self.machines.wait_for_end([name])
            self.machines.start(name)

    def cut(self) -> None:
        """No network for client a."""
        with self.event(f"network of client a cut for {CUT:.0f} s", "a"):
            self.relay.cut()
            time.sleep(CUT)
            self.relay.mend()

    def strangers(self) -> None:
        """Connections without a key, of every kind, while a round goes on."""
        there = self.machines
        what = f"{STRANGERS} strangers of each of {len(KINDS)} kinds at the door"
        with (
            self.event(what) as round_,
            flooded(there.address, there.server / "ca.crt", STRANGERS),
        ):
            self.go()
            there.wait_for(lambda: there.rounds_done() > round_, "the round")
            self.hold()

    def power_cut(self) -> None:
        """Kill everything and start it again."""
        with self.event("all machines cut off from power") as round_:
            self._wait_for_others(round_)
            self.machines.kill_all()
            for each in ("server", *CLIENTS):
                self.machines.start(each)

    def fill_disk(self, name: str) -> int:
        """No room on a client's disk for one round; the round."""
        state = self.machines.client(name) / "state"
        filler = state / "filler"
        is_small = os.path.ismount(state)
        how = "full" if is_small else "not writable any more (RLIMIT_FSIZE)"
        with self.event(f"disk of client {name} {how}", name) as round_:
            if is_small:
                _fill(filler)
            else:
                _limit(self.machines.process(name), 0)
            self.go()
            there = self.machines
            there.wait_for(lambda: there.rounds_done() > round_, "the round")
            self.hold()
            if is_small:
                filler.unlink()
            else:
                _limit(self.machines.process(name), psutil.RLIM_INFINITY)
        return round_

    def end(self) -> list[str]:
        """Let it end; what is not as it should be."""
        self.go()
        everyone = ("server", *CLIENTS)
        codes = self.machines.wait_for_end(everyone)
        wrong = [f"exit code {code} of {name}" for name, code in codes.items() if code]
        left = [str(each) for each in self.machines.processes()]
        return wrong + [f"left behind: {each}" for each in left]


SIGNS = ("starting", "is lost", "listening", "goes on without", ": client '", "cannot be reached")
# What the server says when a part of it is there again.
BACK = {
    "the app": "starting it again",
    "Flower's server": "listening",
    "the door": "starting it again",
    "fedalt server": "listening",
}


def _short(lines: list[str]) -> list[str]:
    """Without times, addresses and repetitions."""
    texts = [line.split("  ", 1)[-1] for line in lines]
    return [f"{each[:90]}…" if len(each) > 90 else each for each in dict.fromkeys(texts)]


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _limit(process: psutil.Process, most: int) -> None:
    process.rlimit(psutil.RLIMIT_FSIZE, (most, psutil.RLIM_INFINITY))


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
    for kind in ("the app", "Flower's server", "the door", "fedalt server"):
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
    return drill.end(), left_out


def compared(drill: Drill, root: Path, left_out: set[tuple[int, str]]) -> list[str]:
    """What differs from a run of the same host and members in one process, undisturbed."""
    machines = drill.machines
    config = read_server_config(machines.server / "federation.toml")

    def member(name: str) -> Client:
        place = read_client_config(machines.client(name) / "client.toml").place
        return open_client(config.terms, name, place.data, root / name, device="cpu")

    members = {each: member(each) for each in CLIENTS}
    wire = Wire({**members, "d": Malicious(members["d"], flood=False)}, left_out)
    gate = Screening(config.firewall)
    open_server(
        config.terms, root / "server", wire, config.rules, gate, lambda _: None
    ).to_the_end()

    wrong = []
    state = config.terms.settings.method.client_state
    for each in CLIENTS:
        mine = newest_state(machines.client(each) / "state", each, state)
        theirs = newest_state(root / each, each, state)
        try:
            assert mine[0] == theirs[0], f"{mine[0]} and {theirs[0]}"
            assert_close(mine[1], theirs[1])
        except AssertionError as error:
            wrong.append(f"the state of {each} differs: {error}")
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
        subprocess.run(["umount", str(drill.machines.client("c") / "state")], capture_output=True)
    print("\n" + ("\n".join(wrong) or "everything is as in the undisturbed federation"))
    if given.folder is None:
        shutil.rmtree(root)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
