"""A training step with two threads, alone and beside other work, with and without the spin count.

    python benchmarks/threads.py --write             # about four minutes, on a quiet machine
    python benchmarks/threads.py --examples 8 --rounds 2 --turns 1           # a quick try

Two clients of the built-in suite train on the built-in base model, in one process with as many
threads as the machine has cores, at least two. `spins briefly` is the command as it is: it sets
GOMP_SPINCOUNT before PyTorch is loaded. `spins long` loads PyTorch first, which keeps its own
default. `beside others` has two processes that never wait for anything beside it. Each is a process
of its own, in turns (A B A B). Printed are medians of the milliseconds of a step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

from document import table, write

OTHERS: Final = 2
MOST_BESIDE: Final = 4.0  # times the step alone
MOST_LOST: Final = 0.05  # of a step alone
OF_THE_USER: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def measure(examples: int, rounds: int) -> None:
    """Train once and print the seconds of a step, of every round but the first."""
    from fedalt.data.suite import write_suite
    from fedalt.runs.lifecycle import start_run
    from fedalt.runs.settings import settings_of
    from fedalt.runs.setup import prepare

    with tempfile.TemporaryDirectory() as name:
        suite, data = Path(name) / "suite", Path(name) / "data"
        write_suite(suite, train=examples, validation=0, test=0)
        data.mkdir()
        for file in sorted(suite.glob("*.train.jsonl"))[:2]:
            file.rename(data / file.name)
        settings = {
            "local_baseline": False,
            "data": {"path": str(data), "validation": 0.0},
            "model": {"targets": "all-linear", "device": "cpu"},
            "training": {"processes": 1},
            "rounds": {"rounds": rounds + 1, "select": "last", "test": False},
        }
        run = start_run(prepare(settings_of(settings, "benchmark")), Path(name) / "run")
        lines = [line for line in run.lines() if line["kind"] == "train" and line["round"]]
    each = []
    for round_ in range(1, rounds + 1):
        of_round = [line for line in lines if line["round"] == round_]
        steps = sum(line["metrics"]["steps"] for line in of_round)
        each.append(sum(line["seconds"] for line in of_round) / steps)
    print(json.dumps(median(each)), flush=True)


@contextmanager
def beside(others: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def step(*, briefly: bool, others: int, examples: int, rounds: int) -> float:
    """Seconds of a step in a process of its own."""
    command = [sys.executable, __file__, "--one", "briefly" if briefly else "long"]
    command += ["--examples", str(examples), "--rounds", str(rounds)]
    clean = {name: value for name, value in os.environ.items() if name not in OF_THE_USER}
    threads = max(2, os.cpu_count() or 2)
    with beside(others):
        told = subprocess.check_output(command, env={**clean, "OMP_NUM_THREADS": str(threads)})
    return float(json.loads(told.splitlines()[-1]))


def compare(examples: int, rounds: int, turns: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    places = [(others, briefly) for others in (0, OTHERS) for briefly in (True, False)]
    found: dict[tuple[int, bool], list[float]] = {place: [] for place in places}
    for _ in range(turns):
        for others, briefly in places:
            seconds = step(briefly=briefly, others=others, examples=examples, rounds=rounds)
            found[others, briefly].append(seconds)
            print(others, "briefly" if briefly else "long", f"{seconds:.3f} s", flush=True)
    medians = {place: median(each) for place, each in found.items()}
    return [
        {
            "waiting threads": "spin briefly" if briefly else "spin long",
            "alone, ms": round(1000 * medians[0, briefly]),
            f"beside {OTHERS} busy processes, ms": round(1000 * medians[OTHERS, briefly]),
            "times": round(medians[OTHERS, briefly] / medians[0, briefly], 1),
            "alone, of spin long": round(medians[0, briefly] / medians[0, False], 2),
        }
        for briefly in (True, False)
    ]


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What was to be reached, and whether it was."""
    times, alone = rows[0]["times"], rows[0]["alone, of spin long"]
    return [
        f"beside {OTHERS} busy processes {times} times its time alone, at most {MOST_BESIDE:g} "
        f"wanted: {'reached' if times <= MOST_BESIDE else 'MISSED'}",
        f"alone {alone} of the time without, at most {1 + MOST_LOST:g} wanted: "
        f"{'reached' if alone <= 1 + MOST_LOST else 'MISSED'}",
    ]


def main() -> None:
    """Measure every variant in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one", choices=("briefly", "long"), help="train once in this process")
    parser.add_argument("--examples", type=int, default=16, help="of each of the two clients")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    wanted = parser.parse_args()
    if wanted.one:
        if wanted.one == "long":
            import torch  # noqa: F401 - before fedalt, which then leaves its threads alone
        measure(wanted.examples, wanted.rounds)
        return
    rows = compare(wanted.examples, wanted.rounds, wanted.turns)
    text = "\n\n".join([table(rows), "\n".join(f"* {each}" for each in verdicts(rows))])
    print(text)
    if wanted.write:
        write("threads", text)


if __name__ == "__main__":
    main()
