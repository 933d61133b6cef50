"""Finished cells of a comparison, a method with a seed each, in one small file to be committed.

A line of JSON is a cell: what it found, what it took, the settings that it was made with, and the
numbers of its rehearsal, which stand for the code. Lines are sorted, so that a cell that joins is
one more line wherever it was computed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from fedalt.core.files import atomic_write, make_private_folder, one_at_a_time
from fedalt.core.reading import StoreError, read_lines


@dataclass(frozen=True)
class Cost:
    """What a run took: numbers, bytes per client and round, seconds of training, peak bytes.

    `trainable_numbers` are all that the client with most of them trains at any time, `trained` by
    slot, `least_numbers` those of the client with fewest; `ranks` the smallest and the largest.
    `steps` and `serving_steps` are means over clients: in all rounds, and before each serving.
    """

    trainable_numbers: int
    upload_bytes: float
    download_bytes: float
    seconds: float
    peak_memory_bytes: int
    least_numbers: int = 0
    ranks: tuple[int, int] = (0, 0)
    steps: float = 0.0
    serving_steps: float = 0.0
    trained: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A method with a seed: test metrics by column and client, costs, and what tells its origin.

    `settings` are those that count, by section; `rehearsal` as `rehearse` gave it; `fedalt` is the
    version, for the reader.
    """

    method: str
    seed: int
    fedalt: str
    settings: Mapping[str, Mapping[str, Any]]
    rehearsal: Sequence[float]
    costs: Cost
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]

    @property
    def key(self) -> tuple[str, int]:
        """What a cell is found by."""
        return self.method, self.seed


class CostLine(TypedDict):
    """A `Cost` as JSON; the first cells had but the first five."""

    trainable_numbers: int
    upload_bytes: float
    download_bytes: float
    seconds: float
    peak_memory_bytes: int
    least_numbers: NotRequired[int]
    ranks: NotRequired[tuple[int, int]]
    steps: NotRequired[float]
    serving_steps: NotRequired[float]
    trained: NotRequired[dict[str, int]]


class _Line(TypedDict):
    method: str
    seed: int
    fedalt: str
    settings: dict[str, dict[str, Any]]
    rehearsal: list[float]
    costs: CostLine
    scores: dict[str, dict[str, dict[str, float]]]


def read_cells(file: Path) -> dict[tuple[str, int], Cell]:
    """The cells of a file by method and seed; none where there is no file. Raises StoreError."""
    cells: dict[tuple[str, int], Cell] = {}
    for number, line in enumerate(read_lines(file, _Line) if file.exists() else [], 1):
        own = line["scores"].get("own")
        if not own or not all("loss" in metrics for metrics in own.values()):
            raise StoreError(
                f"{file} is damaged: line {number}: scores: own: expected clients with a loss each"
            )
        cell = Cell(**{**line, "costs": cost_in(line["costs"])})
        if cell.key in cells:
            raise StoreError(f"{file}: line {number} is a second cell {named(cell.key)}")
        cells[cell.key] = cell
    return cells


def keep_cell(file: Path, cell: Cell) -> None:
    """Add a cell to a file, or replace it there; a crash leaves the file as it was, or whole.

    Several comparisons may keep their cells in one file at the same time.
    """
    make_private_folder(file.parent)
    with one_at_a_time(file.with_name(f".{file.name}.lock")):  # the file itself is replaced
        cells = {**read_cells(file), cell.key: cell}
        lines = (json.dumps(asdict(cells[key]), allow_nan=False) for key in sorted(cells))
        atomic_write(file, "".join(f"{line}\n" for line in lines).encode())


def cost_in(table: Mapping[str, Any]) -> Cost:
    """The costs of a line of JSON that is, or holds, a `CostLine`."""
    took = {item.name: table[item.name] for item in fields(Cost) if item.name in table}
    return Cost(**{**took, "ranks": tuple(took.get("ranks", (0, 0)))})


def named(key: tuple[str, int]) -> str:
    """A cell as a sentence speaks of it."""
    label, seed = key
    return f"{label!r}, seed {seed}"
