"""Peak memory and time of a round against the clients, the cohort's size, and the processes.

    python benchmarks/memory.py                          # 8 and 512 clients, all in every round
    python benchmarks/memory.py --write 8 64 512 4096 10000
    python benchmarks/memory.py --cohorts 32 128 512     # of 1024 clients in one federation
    python benchmarks/memory.py --cohorts 32 128 512 --write
    python benchmarks/memory.py --processes 1 2 --model smollm2 --write

Every client has the same 8 examples; the base model is the built-in one. Every row is a process of
its own. Memory is the most that the process ever held; the time is the median of the rounds after
the first one, of which there is one, or three with `--cohorts`.

With `--processes` memory is that of all processes together, pages that several hold counted once
(the sum of their PSS, ten samples a second, Linux only): the most until the second round begins
(`loading`), and in that round (`training`). Every client is a pass of its own, so
that all processes have work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from document import table, write
from watch import Watch

if TYPE_CHECKING:  # a row of the other tables is a process that imports no more than a run does
    from fedalt.engine.schedule import Event, Line


def write_clients(folder: Path, count: int) -> None:
    """Equal small clients."""
    records = [{"instruction": f"Say the number {n}.", "output": str(n)} for n in range(8)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    for client in range(count):
        (folder / f"client-{client:05d}.train.jsonl").write_text(text)


def measure(clients: int, cohort: int, rounds: int) -> None:
    """Run some rounds and print one JSON object."""
    import torch

    from fedalt.runs.lifecycle import start_run
    from fedalt.runs.settings import settings_of
    from fedalt.runs.setup import prepare

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        write_clients(data, clients)
        table = {
            "local_baseline": False,
            "data": {"path": str(data), "validation": 0.0},
            "training": {"batch_size": 8},
            "rounds": {"rounds": rounds, "participation": cohort / clients},
        }
        run = start_run(prepare(settings_of(table, "benchmark")), Path(name) / "run")
        lines = [line for line in run.lines() if line["kind"] == "round"]
        size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    seconds = median(line["seconds"] for line in lines[1:])
    result = {
        "clients": clients,
        "cohort": lines[-1]["cohort"],
        "peak memory, MiB": round(lines[-1]["peak_memory_bytes"] / 2**20),
        "seconds a round": round(seconds, 2),
        "ms a client of the cohort": round(1000 * seconds / lines[-1]["cohort"], 1),
        "disk, MiB": round(size / 2**20, 1),
    }
    print(json.dumps(result), flush=True)


def compare(sizes: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of clients with the size of its cohorts, measured one by one."""
    rows: list[dict[str, Any]] = []
    for clients, cohort in sizes:
        command = [sys.executable, __file__, "--one", *map(str, (clients, cohort, rounds))]
        row = json.loads(subprocess.check_output(command).splitlines()[-1])
        first = rows[0]["peak memory, MiB"] if rows else row["peak memory, MiB"]
        rows.append({**row, "against the first": round(row["peak memory, MiB"] / first, 2)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


class SecondRound:
    """Notes the most memory up to a run's second round, and lets it be noted anew from there."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.peak = watch, 0

    def on_event(self, event: "Event") -> None:
        """The first sign of the second round."""
        if event.round == 1 and not self.peak:
            self.peak, self.watch.peak = self.watch.peak, 0

    def on_record(self, line: "Line") -> None:
        """Ignore it."""


def measure_processes(processes: int, clients: int, model: str) -> None:
    """Run two rounds and print the most memory of all processes in each, together, in MiB."""
    from fedalt.runs.lifecycle import start_run
    from fedalt.runs.settings import settings_of
    from fedalt.runs.setup import prepare

    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        write_clients(data, clients)
        table = {
            "local_baseline": False,
            "data": {"path": str(data), "validation": 0.0},
            "model": {"name": model, "device": "cpu"},
            "training": {"batch_size": 8, "processes": processes, "pass_tokens": 1},
            "rounds": {"rounds": 2},
        }
        watch = Watch(os.getpid())
        watch.start()
        loading = SecondRound(watch)
        start_run(prepare(settings_of(table, "benchmark")), Path(name) / "run", loading)
        watch.ended.set()
        watch.join()
    print(json.dumps([round(peak / 1024) for peak in (loading.peak, watch.peak)]), flush=True)


def compare_processes(counts: list[int], clients: int, model: str) -> list[dict[str, Any]]:
    """A row for each number of processes."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        command = [sys.executable, __file__, str(clients), "--model", model]
        told = subprocess.check_output([*command, "--one-of-processes", str(count)])
        loading, training = json.loads(told.splitlines()[-1])
        first = rows[0] if rows else {"loading, MiB": loading, "training, MiB": training}
        rows.append(
            {
                "model": model,
                "clients": clients,
                "processes": count,
                "loading, MiB": loading,
                "training, MiB": training,
                "loading, of the first": round(loading / first["loading, MiB"], 2),
                "training, of the first": round(training / first["training, MiB"], 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure every size in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clients", type=int, nargs="*", help="with --cohorts: one number, or 1024")
    parser.add_argument("--cohorts", type=int, nargs="+", metavar="COHORT")
    parser.add_argument("--one", type=int, nargs=3, metavar=("CLIENTS", "COHORT", "ROUNDS"))
    parser.add_argument("--processes", type=int, nargs="+", metavar="COUNT")
    parser.add_argument("--model", default="tiny", help="with --processes: the base model")
    parser.add_argument("--one-of-processes", type=int, metavar="COUNT")
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    wanted = parser.parse_args()
    if wanted.one:
        measure(*wanted.one)
        return
    if wanted.one_of_processes:
        measure_processes(wanted.one_of_processes, wanted.clients[0], wanted.model)
        return
    if wanted.processes:
        (clients,) = wanted.clients or [8]
        name, rows = "processes-memory", compare_processes(wanted.processes, clients, wanted.model)
    elif wanted.cohorts:
        (clients,) = wanted.clients or [1024]
        name, rows = "cohorts", compare([(clients, each) for each in wanted.cohorts], rounds=4)
    else:
        name = "memory"
        rows = compare([(each, each) for each in wanted.clients or [8, 512]], rounds=2)
    print(table(rows))
    if wanted.write:
        write(name, table(rows))


if __name__ == "__main__":
    main()
