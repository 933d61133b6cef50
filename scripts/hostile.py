"""Send thousands of hostile answers and calls to a federation's two halves; print counts by kind.

    python scripts/hostile.py                       10,000 answers and 10,000 calls, FedALT
    python scripts/hostile.py --method fedit --seed 3 --count 1000

Exits with 1 if one counts, stops a round, changes honest clients' results or a client's disk.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hostile_federation import hostile_answers, hostile_calls, record


def table(head: str, counts: Mapping[str, int]) -> str:
    """Counts by kind, for a document."""
    rows = [f"| {kind} | {counts[kind]} |" for kind in sorted(counts)]
    return "\n".join(
        [f"| {head} | sent |", "|---|---|", *rows, f"| all | {sum(counts.values())} |"]
    )


def main() -> None:
    """Play, print, and say what went wrong."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    words.add_argument("--method", default="fedalt", help="whose rounds are played")
    words.add_argument("--count", type=int, default=10_000, help="answers, and as many calls")
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.ERROR)  # a client's own account of each call that it refuses
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        root, began = Path(folder), time.monotonic()
        recorded, parts = record(root, given.method)
        wrong = hostile_answers(recorded, root / "plays", given.count, given.seed)
        print(table("hostile answer", recorded.counts))
        calls, more = hostile_calls(recorded, parts, root / "calls", given.count, given.seed)
        print("\n" + table("hostile call", calls))
    problems = wrong + more
    print(f"\n{time.monotonic() - began:.0f} s; " + ("\n".join(problems) or "nothing came of any"))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
