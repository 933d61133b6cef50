"""What `scripts/drill.py --private` does: secure sums with noise, and kills in every step."""

import time
from typing import Any

from drill_events import Drill
from machines import kill

from fedalt.federation.messages import Step

ROUNDS = 12
PRIVATE: dict[str, Any] = {
    "rounds": {"rounds": ROUNDS, "select": "last"},
    "training": {"local_epochs": 8},
    "privacy": {"secure_sum": True, "unit": "client", "noise": 0.1, "clip": 0.5, "seed": 1},
    "traffic": {"download": "int8"},
}
STEPS: tuple[Step, ...] = ("share", "mask", "unmask")


def private_drill(drill: Drill) -> list[str]:
    """Server or app killed in each step of a sum, a client in two of them, and all at once."""
    drill.begin()
    drill.hold()
    drill.kill_waiting("fedalt server")
    for step in STEPS:
        kill_summing(drill, "fedalt server" if step == "mask" else "the app", step)
    for step in STEPS[:2]:
        kill_client_summing(drill, "a", step)
    drill.kill_client("a", "while training")
    drill.kill_client("a", "between two rounds")
    drill.power_cut()
    return drill.end()


def kill_summing(drill: Drill, kind: str, step: Step) -> None:
    """Kill a part of the server as soon as the first answer to a step is on disk."""
    with drill.event(f"{kind} killed in the step {step!r} of a sum") as round_:
        drill.wait_for_others(round_)
        victim = drill.victim(kind)
        drill.go()
        _wait_for(drill, round_, step)
        drill.kill(kind, victim)


def kill_client_summing(drill: Drill, name: str, step: Step) -> None:
    """Kill a client as soon as somebody has answered a step, and start it again."""
    machines = drill.machines
    with drill.event(f"client {name} killed in the step {step!r} of a sum", name) as round_:
        drill.wait_for_others(round_)
        drill.go()
        _wait_for(drill, round_, step)
        kill(machines.process(name))
        drill.hold()
        machines.started[name].wait()
        machines.start(name)


def _wait_for(drill: Drill, round_: int, step: Step) -> None:
    folder = drill.machines.run / "incoming" / f"{round_:04d}" / step
    while drill.machines.rounds_done() == round_ and not any(folder.glob("*.bin")):
        time.sleep(0.0005)
