"""A run's numbers for TensorBoard, written while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def require_tensorboard() -> None:
    """Raise ValueError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError("TensorBoard is not installed: `pip install 'fedalt[tensorboard]'`")


@dataclass(frozen=True)
class TensorBoard:
    """Writes every metric of a line under kind/metric/column/client; a step is a round."""

    writer: "SummaryWriter"

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, done: int = 0) -> Iterator["TensorBoard"]:
        """Write into a folder; what it holds of rounds from `done` on is forgotten."""
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=done)
        try:
            yield cls(writer)
        finally:
            writer.close()

    def hear(self, event: object) -> None:
        """Only whole rounds are drawn."""

    def wrote(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of a line."""
        if line["kind"] == "round":
            self.writer.add_scalar("round/seconds", line["seconds"], line["round"])
            self.writer.flush()
            return
        kind = line["split"] if line["kind"] == "score" else "train"
        for metric, value in line["metrics"].items():
            tag = f"{kind}/{metric}/{line['column']}/{line['client']}"
            self.writer.add_scalar(tag, value, line["round"])
