"""A run in one process with all threads against as many processes with one thread each.

    python benchmarks/processes.py --write         # 8 and 16 clients of the built-in suite
    python benchmarks/processes.py --clients 8 --rounds 2 --turns 1      # a quick try

FedALT beside the local-only baseline on the suite and the base model of `fedalt demo`, validated on
40 examples of each client after every round and tested on 40 at the end. Each run is a process of
its own, in turns (A B A B). Printed are medians: `a round` are the seconds of a round with its
validation, `in all` those of the run with its test and, where there are several, the start of the
other processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from document import table, write


def measure(processes: int, clients: int, rounds: int) -> None:
    """Run once and print one JSON object."""
    from fedalt.data.suite import TASKS, write_suite
    from fedalt.runs.lifecycle import start_run
    from fedalt.runs.settings import settings_of
    from fedalt.runs.setup import prepare

    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        write_suite(data, test=40, clients_per_task=clients // len(TASKS))
        settings = {
            "data": {"path": str(data)},
            "model": {"targets": "all-linear", "device": "cpu"},
            "training": {"processes": processes},
            "rounds": {"rounds": rounds},
            "scoring": {"max_new_tokens": 8},
        }
        prepared = prepare(settings_of(settings, "benchmark"))
        began = time.monotonic()
        run = start_run(prepared, Path(name) / "run")
        result = {
            "a round": median(line["seconds"] for line in run.lines() if line["kind"] == "round"),
            "in all": time.monotonic() - began,
        }
    print(json.dumps(result), flush=True)


def compare(processes: int, clients: int, rounds: int, turns: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    variants = {1: processes, processes: 1}  # threads of each process
    found: dict[int, list[dict[str, float]]] = {each: [] for each in variants}
    for _ in range(turns):
        for each in variants:
            command = [sys.executable, __file__, "--one", str(each)]
            command += ["--clients", str(clients), "--rounds", str(rounds)]
            # The first process counts the threads and shares them out.
            environment = {**os.environ, "OMP_NUM_THREADS": str(processes)}
            told = subprocess.check_output(command, env=environment).splitlines()[-1]
            found[each].append(json.loads(told))
            print(clients, each, told.decode(), flush=True)
    rows = []
    for each, threads in variants.items():
        row: dict[str, Any] = {"clients": clients, "processes": each, "threads of each": threads}
        for what in ("a round", "in all"):
            alone, here = (median(one[what] for one in found[which]) for which in (1, each))
            row[f"{what}, s"] = round(here, 1)
            row[f"{what}, times faster"] = round(alone / here, 2)
        rows.append(row)
    return rows


def main() -> None:
    """Measure every variant in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one", type=int, metavar="PROCESSES", help="run once in this process")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    wanted = parser.parse_args()
    if wanted.one:
        measure(wanted.one, wanted.clients[0], wanted.rounds)
        return
    if wanted.processes < 2:
        parser.error("--processes is at least 2, and this machine has one core")
    rows = [
        row
        for clients in wanted.clients
        for row in compare(wanted.processes, clients, wanted.rounds, wanted.turns)
    ]
    print(table(rows))
    if wanted.write:
        write("processes", table(rows))


if __name__ == "__main__":
    main()
