"""What `scripts/drill.py` does to a federation of real processes, one event after the other."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from damages import Kind, damaged, delete, empty, half_line, truncate
from floods import KINDS, flooded
from machines import Machines, Relay, kill

CLIENTS = ("a", "b", "c", "d")
STRANGERS = 20  # of each kind
CUT = 75.0  # seconds without a network; Flower counts a client as gone after 60
SIGNS = ("starting", "is lost", "listening", "goes on without", ": client '", "cannot be reached")
# What the server says when a part of it is running again.
BACK = {
    "the app": "starting it again",
    "Flower's server": "listening",
    "the gateway": "starting it again",
    "fedalt server": "listening",
}


@dataclass
class Drill:
    """The machines, what was done to them, and what was seen of it.

    One client sets the pace: while it is stopped, no round ends.
    """

    machines: Machines
    pace: str = "b"
    rows: list[tuple[int, str, str, str]] = field(default_factory=list)
    refusals: list[tuple[str, str, str]] = field(default_factory=list)  # who, file, what was said

    def begin(self) -> None:
        """Start everybody and wait for the first round."""
        self.machines.start("server")
        for name in self.machines.clients:
            self.machines.start(name)
        self.machines.wait_for_round(1)

    def hold(self) -> None:
        """Let no round end."""
        self.machines.process(self.pace).suspend()

    def go(self) -> None:
        """Let rounds end."""
        self.machines.process(self.pace).resume()

    @contextmanager
    def event(self, what: str, *whom: str) -> Iterator[int]:
        """Do something to a client in a round, which then has to end; the number of the round."""
        machines, round_ = self.machines, self.machines.rounds_done()
        before = {name: len(machines.said(name)) for name in ("server", *machines.clients)}
        began = time.monotonic()
        print(f"round {round_}: {what}", file=sys.stderr, flush=True)
        yield round_
        self.go()
        machines.wait_for_round(round_ + 1)
        self.hold()
        seen = [
            line.strip()
            for name, at in before.items()
            for line in machines.said(name)[at:].splitlines()
            if any(word in line for word in SIGNS) and name in ("server", *whom)
        ]
        outcome = f"counted after {time.monotonic() - began:.0f} s"
        self.rows.append((round_, what, "; ".join(_short(seen)), outcome))

    def kill_waiting(self, kind: str) -> None:
        """Kill a part of the server while it waits for a client."""
        with self.event(f"{kind} killed while clients are waited for") as round_:
            self.wait_for_others(round_)
            self.kill(kind)

    def kill_aggregating(self, kind: str) -> None:
        """Kill a part of the server as soon as the last answer is machines."""
        with self.event(f"{kind} killed while aggregating") as round_:
            self.wait_for_others(round_)
            victim = self.victim(kind)
            folder = self.machines.run / "incoming" / f"{round_:04d}" / f"{self.pace}.bin"
            self.go()
            while not folder.exists() and self.machines.rounds_done() == round_:
                time.sleep(0.0005)
            self.kill(kind, victim)

    def kill_between(self, kind: str) -> None:
        """Kill a part of the server as soon as a round counts."""
        with self.event(f"{kind} killed between two rounds") as round_:
            victim = self.victim(kind)
            self.go()
            while self.machines.rounds_done() == round_:
                time.sleep(0.0005)
            self.kill(kind, victim)

    def wait_for_others(self, round_: int) -> None:
        """Wait until everybody but the one who sets the pace has answered."""
        machines = self.machines
        wanted = set(machines.clients) - {self.pace}
        machines.wait_for(lambda: wanted <= set(machines.answered(round_)), "the others' answers")

    def victim(self, kind: str) -> psutil.Process:
        """The process of a part of the server."""
        machines = self.machines
        find: dict[str, Callable[[], psutil.Process]] = {
            "the app": machines.app,
            "Flower's server": machines.superlink,
            "the gateway": machines.gateway,
            "fedalt server": lambda: machines.process("server"),
        }
        return find[kind]()

    def kill(self, kind: str, victim: psutil.Process | None = None) -> None:
        """Kill a part of the server, and wait until it runs again."""
        machines, sign = self.machines, BACK[kind]
        before = machines.said("server").count(sign)
        kill(victim or self.victim(kind))
        self.hold()  # or rounds go by while it comes back
        if kind == "fedalt server":
            machines.started["server"].wait()
            machines.start("server")
        machines.wait_for(lambda: machines.said("server").count(sign) > before, f"{kind} again")

    def kill_client(self, name: str, when: str) -> None:
        """Kill a client at some moment of its round, and start it again."""
        machines = self.machines
        with self.event(f"client {name} killed {when}", name) as round_:
            state = machines.client(name) / "state"
            if when == "between two rounds":
                machines.wait_for(lambda: name in machines.answered(round_), "its answer")
            elif when == "while training":  # the first thing it does with a call
                told = state / "accepted.json"
                machines.wait_for(
                    lambda: json.loads(told.read_text())["accepted"] == round_ - 1, "its call"
                )
            else:
                kept = state / "answer.bin"
                old = kept.stat().st_mtime_ns
                while kept.stat().st_mtime_ns == old and name not in machines.answered(round_):
                    time.sleep(0.0005)
            kill(machines.process(name))
            machines.started[name].wait()
            machines.start(name)

    def stop_client(self, name: str) -> None:
        """End a client politely, and start it again."""
        with self.event(f"client {name} ended with SIGTERM", name):
            self.machines.started[name].send_signal(signal.SIGTERM)
            self.machines.wait_for_end([name])
            self.machines.start(name)

    def cut(self, relay: Relay) -> None:
        """No network for client a, which is behind a relay."""
        with self.event(f"network of client a cut for {CUT:.0f} s", "a"):
            relay.cut()
            time.sleep(CUT)
            relay.mend()

    def strangers(self) -> None:
        """Connections without a key, of every kind, while a round goes on."""
        machines = self.machines
        what = f"{STRANGERS} strangers of each of {len(KINDS)} kinds at the gateway"
        with (
            self.event(what) as round_,
            flooded(machines.address, machines.server / "ca.crt", STRANGERS),
        ):
            self.go()
            machines.wait_for(lambda: machines.rounds_done() > round_, "the round")
            self.hold()

    def power_cut(self) -> None:
        """Kill everything and start it again."""
        with self.event("all machines cut off from power") as round_:
            self.wait_for_others(round_)
            self.machines.kill_all()
            for name in ("server", *self.machines.clients):
                self.machines.start(name)

    def damage_files(self) -> None:
        """Damage files while everything is stopped; each restart has to be refused by name."""
        machines, run = self.machines, self.machines.run
        with self.event("files damaged and put back while all was stopped") as round_:
            self.wait_for_others(round_)
            machines.kill_all()
            upload = max((run / "server" / "latest" / "c").glob("*.safetensors"))
            for file, spoil in (
                (max((run / "server").glob("*.safetensors")), delete),
                (upload, truncate),
                (run / "progress.json", delete),
                (run / "rounds.jsonl", half_line),
            ):
                self._refused("server", file, spoil)
            self._refused("a", machines.client("a") / "state" / "accepted.json", empty)
            answer = run / "incoming" / f"{round_:04d}" / "c.bin"
            os.truncate(answer, answer.stat().st_size // 2)  # c is asked again
            machines.start("server")
            states = machines.client("b") / "state" / "clients" / "b"
            self._called_in_vain("b", max(states.glob("*.safetensors")))
            for name in machines.clients:
                machines.start(name)

    def _refused(self, name: str, file: Path, spoil: "Kind") -> None:
        """Start a machine with a damaged file: it has to end and to name the file."""
        before = len(self.machines.said(name))
        with damaged(file, spoil):
            code = self._code_of(name)
        said = self.machines.said(name)[before:]
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if code != 2 or len(errors) != 1 or file.name not in errors[0]:
            raise AssertionError(f"{file} damaged, exit code {code} of {name}:\n{said}")
        del self.machines.started[name]  # whoever waits for something would miss it
        self.refusals.append((name, str(file.relative_to(self.machines.root)), errors[0]))

    def _code_of(self, name: str) -> int:
        self.machines.start(name)
        code: int = self.machines.wait_for_end([name])[name]
        return code

    def _called_in_vain(self, name: str, file: Path) -> None:
        """Start a client with a damaged state: it has to name the file once it is called."""
        machines, before = self.machines, len(self.machines.said(name))
        with damaged(file, truncate):
            machines.start(name)
            wanted = f"{file} was changed after it was written"
            machines.wait_for(lambda: wanted in machines.said(name)[before:], f"the name of {file}")
            kill(machines.process(name))
            machines.started[name].wait()
        self.refusals.append((name, str(file.relative_to(machines.root)), wanted))

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
            machines = self.machines
            machines.wait_for(lambda: machines.rounds_done() > round_, "the round")
            self.hold()
            if is_small:
                filler.unlink()
            else:
                _limit(self.machines.process(name), psutil.RLIM_INFINITY)
        return round_

    def end(self) -> list[str]:
        """Let it end; what is not as it should be."""
        self.go()
        everyone = ("server", *self.machines.clients)
        codes = self.machines.wait_for_end(everyone)
        wrong = [f"exit code {code} of {name}" for name, code in codes.items() if code]
        return wrong + [f"left behind: {process}" for process in self.machines.processes()]


def _short(lines: list[str]) -> list[str]:
    """Without times, addresses and repetitions."""
    texts = [line.split("  ", 1)[-1] for line in lines]
    return [f"{text[:90]}…" if len(text) > 90 else text for text in dict.fromkeys(texts)]


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _limit(process: psutil.Process, most: int) -> None:
    process.rlimit(psutil.RLIMIT_FSIZE, (most, psutil.RLIM_INFINITY))
