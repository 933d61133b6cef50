"""CPU seconds of commands before any work of theirs, and of a small run's report.

    python benchmarks/startup.py --write

Every command runs in a process of its own, in turns with `import torch`. The table has medians, and
their ratio to torch: `fedalt --help` and `fedalt methods` should stay below 0.17, `import fedalt`
below 0.1. The report is that of a run of eight clients and two rounds, which is made first; its
imports are measured by themselves, since a report should take less than 2 seconds beside them.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Final

from document import table, write

TORCH: Final = "import torch"
IMPORTS: Final = "imports of a report"
REPORT: Final = "fedalt report RUN"
COMMANDS: Final = {
    TORCH: ["-c", TORCH],
    "import fedalt": ["-c", "import fedalt"],
    "fedalt --help": ["-m", "fedalt", "--help"],
    "fedalt methods": ["-m", "fedalt", "methods"],
    "fedalt run --help": ["-m", "fedalt", "run", "--help"],
    "fedalt federation --help": ["-m", "fedalt", "federation", "--help"],
    IMPORTS: [
        "-c",
        "import altair, jinja2, fedalt.cli.report; "
        "from fedalt.report import figures, page, records, run_page; page.require_report()",
    ],
}


def cpu_of(words: list[str]) -> float:
    """CPU seconds of a Python process, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def small_run(folder: Path) -> Path:
    """A finished run of the built-in suite, two rounds of few examples."""
    data, run = folder / "data", folder / "run"
    sizes = ["--train", "8", "--validation", "2", "--test", "4"]
    cpu_of(["-m", "fedalt", "data", "suite", str(data), *sizes])
    cpu_of(["-m", "fedalt", "run", "--data", str(data), "--out", str(run), "--rounds", "2"])
    return run


def measure(commands: dict[str, list[str]], turns: int) -> list[dict[str, str]]:
    """The rows of the table."""
    for words in commands.values():
        cpu_of(words)  # compiled and in the cache of files
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(turns):
        for name, words in commands.items():
            taken[name].append(cpu_of(words))
    medians = {name: median(seconds) for name, seconds in taken.items()}
    return [
        {
            "command": f"`{name}`" if name != IMPORTS else name,
            "CPU, s": f"{seconds:.2f}",
            "of torch": f"{seconds / medians[TORCH]:.2f}",
            "beside its imports, s": f"{seconds - medians[IMPORTS]:.2f}" if name == REPORT else "",
        }
        for name, seconds in medians.items()
    ]


def main() -> None:
    """Print the table, and put it into the document where asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(Path(folder))
        rows = measure({**COMMANDS, REPORT: ["-m", "fedalt", "report", str(run)]}, args.turns)
    print(table(rows))
    if args.write:
        write("startup", table(rows))


if __name__ == "__main__":
    main()
