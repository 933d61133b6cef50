"""A further process of a run, started by the run's first one and by nobody else."""

import json
import signal
import sys
from pathlib import Path

from fedalt.cli.output import hush_libraries


def main() -> None:
    """Take part in the run of a folder; both arguments come from `fedalt.processes`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends us
    hush_libraries()
    from fedalt.gloo import Place
    from fedalt.processes import end_with_parent
    from fedalt.runs import take_part

    end_with_parent()
    path, place = sys.argv[1:]
    take_part(Path(path), Place(**json.loads(place)))


if __name__ == "__main__":
    main()
