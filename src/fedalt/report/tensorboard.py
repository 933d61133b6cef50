"""A run's numbers as TensorBoard's event files."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalt.report.numbers import numbers_of, step_of


@contextmanager
def writing_tensorboard(run: Path) -> Iterator["TensorBoard"]:
    """Write below RUN/tensorboard; what was there before is told to be forgotten.

    By TensorBoard's own writer: PyTorch's would import PyTorch.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run / "tensorboard"))
    writer.add_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
    try:
        yield TensorBoard(writer)
    finally:
        writer.close()


@dataclass(frozen=True)
class TensorBoard:
    """Writes every number of a line; a step is a round."""

    writer: Any

    def on_event(self, event: object) -> None:
        """Only whole lines are drawn."""

    def on_record(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of a line."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, number in numbers_of(line):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=number)])
            event = Event(wall_time=time.time(), step=step_of(line), summary=summary)
            self.writer.add_event(event)
        if line["kind"] == "round":
            self.writer.flush()
