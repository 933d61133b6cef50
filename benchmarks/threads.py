"""A training step with two threads, alone and beside other work, with and without the spin count.

    python benchmarks/threads.py --write             # about six minutes, on a quiet machine
    python benchmarks/threads.py --pairs 10          # a quick try

Two clients train in one pass through a model of the built-in base's size, with as many threads as
the machine has cores, at least two. `spin briefly` is the command as it is: it sets GOMP_SPINCOUNT
before PyTorch is loaded. `spin long` loads PyTorch first, which keeps its own default. Both are
processes that live all the time and take a step in turns, while the other waits for its word, so
that a machine that is faster in one minute than in the next is so for both. They do so alone,
beside two processes that never wait for anything, and beside a second process of their own kind,
whose threads wait for each other, too. Printed are medians of the milliseconds of a step, and
medians of the quotients of neighbouring steps.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Final

from document import table, write

OTHERS: Final = 2
MOST_BESIDE: Final = 3.5  # times the step alone
MOST_LOST: Final = 0.05  # of a step alone
OF_THE_USER: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def work() -> None:
    """Take a step at every line that is read, and print the seconds it took."""
    from step_variants import Ours, examples_of, model_of

    ours = Ours(model_of("5M"), examples_of(2, 8, 8192))
    for _ in sys.stdin:
        began = time.perf_counter()
        ours.train(together=True)
        print(time.perf_counter() - began, flush=True)


@contextmanager
def worker(way: str, spins: str | None) -> Iterator[subprocess.Popen[str]]:
    """A process that takes a step when it is told to."""
    clean = {name: value for name, value in os.environ.items() if name not in OF_THE_USER}
    if spins is not None:
        clean["GOMP_SPINCOUNT"] = spins
    threads = str(max(2, os.cpu_count() or 2))
    command = [sys.executable, __file__, "--one", way]
    env = {**clean, "OMP_NUM_THREADS": threads}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]


def step(*processes: subprocess.Popen[str]) -> float:
    """Seconds of a step that workers take at the same time, of the slowest one."""
    for process in processes:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return max(float(process.stdout.readline()) for process in processes)  # type: ignore[union-attr]


@contextmanager
def beside(others: int) -> Iterator[None]:
    """So many processes that keep a core busy each, until they are ended or this one is gone."""
    busily = f"import os\nwhile os.getppid() == {os.getpid()}:\n    sum(range(10**6))"
    busy = [subprocess.Popen([sys.executable, "-c", busily]) for _ in range(others)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def compare(pairs: int, spins: str | None) -> list[dict[str, Any]]:
    """A row for each variant."""
    seconds: dict[tuple[str, str], list[float]] = {}
    ways = ("briefly", "long")
    with ExitStack() as stack:
        counts = {"briefly": spins, "long": None}
        workers = {
            way: [stack.enter_context(worker(way, counts[way])) for _ in range(2)] for way in ways
        }
        for two in workers.values():
            step(*two)  # the first one warms up

        def take(place: str, turns: int, at_once: int = 1) -> None:
            for _ in range(turns):
                for way in ways:
                    taken = step(*workers[way][:at_once])
                    seconds.setdefault((place, way), []).append(taken)

        take("alone", pairs)
        with beside(OTHERS):
            take("busy", max(1, pairs // 4))
        take("twin", max(1, pairs // 20), at_once=2)
    medians = {place: median(taken) for place, taken in seconds.items()}
    of_long = zip(seconds["alone", "briefly"], seconds["alone", "long"], strict=True)
    lost = {"briefly": median(a / b for a, b in of_long), "long": 1.0}
    return [
        {
            "waiting threads": f"spin {way}",
            "alone, ms": round(1000 * medians["alone", way]),
            f"beside {OTHERS} busy processes, ms": round(1000 * medians["busy", way]),
            "times": round(medians["busy", way] / medians["alone", way], 1),
            "two such runs, ms": round(1000 * medians["twin", way]),
            "times, two": round(medians["twin", way] / medians["alone", way], 1),
            "alone, of spin long": round(lost[way], 2),
        }
        for way in ways
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
    parser.add_argument("--one", choices=("briefly", "long"), help="take steps in this process")
    parser.add_argument("--pairs", type=int, default=60, help="of steps, alone and beside others")
    parser.add_argument("--spins", help="another spin count than the package's own")
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    wanted = parser.parse_args()
    if wanted.one:
        if wanted.one == "briefly":
            import fedalt  # noqa: F401 - sets the spin count before torch is loaded
        work()
        return
    rows = compare(wanted.pairs, wanted.spins)
    text = "\n\n".join([table(rows), "\n".join(f"* {each}" for each in verdicts(rows))])
    print(text)
    if wanted.write:
        write("threads", text)


if __name__ == "__main__":
    main()
