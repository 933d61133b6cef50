"""A run's numbers in Trackio's local store, a row for each round."""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fedalt.core.reading import read_text
from fedalt.report.numbers import numbers_of, step_of

PROJECT = "fedalt"
_WRITER = Path(__file__).with_name("trackio_writer.py")


@contextmanager
def writing_trackio(run: Path) -> Iterator["Trackio"]:
    """Write below RUN/trackio, or where TRACKIO_DIR says; the run's rows of before are deleted.

    Trackio asks the hub for the user's name when a run begins, and reads where to write when it
    is imported. So it runs in a process of its own, which is told to stay offline.
    """
    shared = os.environ.get("TRACKIO_DIR")
    about = {
        "project": PROJECT,
        "name": run.resolve().name,
        # Whose rows to delete; in a store of its own, which may have moved, they are all its.
        "folder": str(run.resolve()) if shared else None,
        "settings": tomllib.loads(read_text(run / "settings.toml")),
    }
    theirs = {key: value for key, value in os.environ.items() if not key.startswith("TRACKIO_")}
    ours = {
        "TRACKIO_DIR": shared or str((run / "trackio").resolve()),
        "TRACKIO_STORAGE_MODE": "sqlite",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", str(_WRITER)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env={**theirs, **ours},
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C stops the run; what is written, it finishes
        )
        assert process.stdin is not None
        try:
            _send(process.stdin, about)
            trackio = Trackio(process.stdin)
            yield trackio
            trackio.end()
            gone = False
        except _GoneError:
            gone = True
        finally:
            with suppress(BrokenPipeError):  # what cannot be sent any more
                process.stdin.close()
            code = process.wait()
        if gone or code:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines()
            raise ValueError(f"trackio: {words[-1] if words else f'exit code {code}'}")


@dataclass(frozen=True)
class Trackio:
    """Collects the numbers of a round and sends them together; a step is a round."""

    pipe: IO[str]
    rows: dict[int, dict[str, float]] = field(default_factory=dict)

    def on_event(self, event: object) -> None:
        """Only whole rounds are kept."""

    def on_record(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of a line; the last line of a round sends it."""
        if numbers := dict(numbers_of(line)):
            self.rows.setdefault(step_of(line), {}).update(numbers)
        if line["kind"] == "round":
            self.end()

    def end(self) -> None:
        """Send what was collected; test scores follow the last round."""
        for step, metrics in self.rows.items():
            _send(self.pipe, {"step": step, "metrics": metrics})
        self.rows.clear()


class _GoneError(Exception):
    """The process has ended before the run."""


def _send(pipe: IO[str], value: Mapping[str, Any]) -> None:
    try:
        pipe.write(json.dumps(value) + "\n")
        pipe.flush()
    except BrokenPipeError as error:
        raise _GoneError from error
