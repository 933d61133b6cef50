"""Writes what comes on stdin into Trackio's store: what the run is, then a row on each line.

A program of its own, which knows nothing of fedalt; see `fedalt.report.trackio`.
"""

import json
import sys
import warnings

import trackio


def main() -> None:
    """Replace the run and write until stdin ends; exits with 1 if a row could not be kept."""
    faults: list[str] = []
    # Trackio drops what it cannot write and only warns.
    warnings.showwarning = lambda message, *_: faults.append(str(message))
    about = json.loads(sys.stdin.readline())
    project, folder = about["project"], about["folder"]
    for known in _known(project):
        if folder is None or (known.config or {}).get("folder") == folder:
            known.delete()
    run = trackio.init(
        project=project,
        name=about["name"],
        config={"folder": folder, **about["settings"]},
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for line in sys.stdin:
        row = json.loads(line)
        run.log(row["metrics"], step=row["step"])
    trackio.finish()
    if faults:
        sys.exit(faults[0])


def _known(project: str) -> list[trackio.api.Run]:
    """The runs that are there."""
    try:
        return list(trackio.Api().runs(project))
    except ValueError:  # there is no store yet
        return []


if __name__ == "__main__":
    main()
