"""CPU seconds of commands that need no tensors, and their share of importing torch.

    python benchmarks/startup.py [--turns 5] [--run RUN]

Every command runs in a process of its own, in turns with `import torch`. Printed are medians, and
the ratio to torch: `fedalt --help` and `fedalt methods` should stay below 0.17, `import fedalt`
below 0.1. With RUN, a finished run, its report is measured too, which replaces RUN/report.html.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Final

TORCH: Final = "import torch"
COMMANDS: Final = {
    TORCH: ["-c", TORCH],
    "import fedalt": ["-c", "import fedalt"],
    "fedalt --help": ["-m", "fedalt", "--help"],
    "fedalt methods": ["-m", "fedalt", "methods"],
    "fedalt run --help": ["-m", "fedalt", "run", "--help"],
    "fedalt federation --help": ["-m", "fedalt", "federation", "--help"],
}


def cpu_of(words: list[str]) -> float:
    """CPU seconds of a Python process, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the medians and the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    commands = dict(COMMANDS)
    if args.run is not None:
        commands["fedalt report RUN"] = ["-m", "fedalt", "report", str(args.run)]
    for words in commands.values():
        cpu_of(words)  # compiled and in the cache of files
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.turns):
        for name, words in commands.items():
            taken[name].append(cpu_of(words))
    torch = median(taken[TORCH])
    for name, seconds in taken.items():
        print(f"{name:26} {median(seconds):5.2f} s   {median(seconds) / torch:.2f} of torch")


if __name__ == "__main__":
    main()
