"""Peak memory and time of a round against the number of clients, each count in its own process.

    python benchmarks/memory.py                          # 8 and 512 clients
    python benchmarks/memory.py --write 8 64 512 4096

Every client has the same 8 examples; the base model is the built-in one. Memory is the most that
the process ever held; the time is that of the second round.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from document import table, write

ROUNDS = 2


def write_clients(folder: Path, count: int) -> None:
    """Equal small clients."""
    records = [{"instruction": f"Say the number {n}.", "output": str(n)} for n in range(8)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    for client in range(count):
        (folder / f"client-{client:05d}.train.jsonl").write_text(text)


def measure(clients: int) -> None:
    """Run two rounds and print one JSON object."""
    import torch

    from fedalt.prepare import prepare
    from fedalt.runs import start_run
    from fedalt.settings import settings_of

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        write_clients(data, clients)
        table = {
            "yardstick": False,
            "data": {"path": str(data), "validation": 0.0},
            "training": {"batch_size": 8},
            "rounds": {"rounds": ROUNDS},
        }
        run = start_run(prepare(settings_of(table, "benchmark")), Path(name) / "run")
        rounds = [line for line in run.lines() if line["kind"] == "round"]
        size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    result = {
        "clients": clients,
        "peak memory, MiB": round(rounds[-1]["peak_memory_bytes"] / 2**20),
        "seconds a round": round(rounds[-1]["seconds"], 2),
        "disk, MiB": round(size / 2**20, 1),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    """Measure every count in a process of its own and print a table."""
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
        return
    rows: list[dict[str, Any]] = []
    for count in [int(each) for each in sys.argv[1:] if each != "--write"] or [8, 512]:
        command = [sys.executable, __file__, "--one", str(count)]
        row = json.loads(subprocess.check_output(command).splitlines()[-1])
        first = rows[0]["peak memory, MiB"] if rows else row["peak memory, MiB"]
        rows.append({**row, "against the first": round(row["peak memory, MiB"] / first, 2)})
        print(json.dumps(rows[-1]), flush=True)
    if "--write" in sys.argv:
        write("memory", table(rows))


if __name__ == "__main__":
    main()
