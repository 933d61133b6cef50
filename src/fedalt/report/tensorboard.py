"""A run's numbers as TensorBoard's event files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedalt.report.numbers import numbers_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def writing_tensorboard(run: Path) -> Iterator["TensorBoard"]:
    """Write below RUN/tensorboard; what was there before is told to be forgotten."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=0)
    try:
        yield TensorBoard(writer)
    finally:
        writer.close()


@dataclass(frozen=True)
class TensorBoard:
    """Writes every number of a line; a step is a round."""

    writer: "SummaryWriter"

    def on_event(self, event: object) -> None:
        """Only whole lines are drawn."""

    def on_record(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of a line."""
        for name, value in numbers_of(line):
            self.writer.add_scalar(name, value, line["round"])
        if line["kind"] == "round":
            self.writer.flush()
