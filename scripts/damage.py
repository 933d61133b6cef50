"""Damage folders of a run and of a federation, each in one way, and go on with each.

    python scripts/damage.py              1,000 folders, half of each sort; prints counts
    python scripts/damage.py --seed 17    one of each sort, and what was said

Each has to go on to the same bits as without the damage, or to be refused with one sentence that
names the damaged file. Exits with 1 if one does neither.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from damaged_folders import OfAFederation, OfARun, damage


def main() -> int:
    """Damage as many as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="folders in all")
    parser.add_argument("--seed", type=int, help="one seed alone, of each sort")
    asked = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        for sort, make in (("run", OfARun), ("federation", OfAFederation)):
            root = Path(name) / sort
            root.mkdir()
            whole = make(root)
            counts: Counter[tuple[str, str]] = Counter()
            for seed in range(asked.count // 2) if asked.seed is None else [asked.seed]:
                outcome = damage(whole, root / "copy", seed)
                counts[outcome.kind, outcome.result] += 1
                if not outcome.fine or asked.seed is not None:
                    bad += not outcome.fine
                    print(f"{sort} {seed}: {outcome}", flush=True)
            print(f"\n{sort}: {counts.total()} folders")
            for (kind, result), count in sorted(counts.items()):
                print(f"  {kind:<16} {result:<30} {count}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
