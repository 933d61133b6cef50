"""The trials of a small search over learning rates and ranks, the same for every method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from fedalt.comparison import Entry
from fedalt.files import atomic_write
from fedalt.settings import lora_of, read_table


@dataclass(frozen=True)
class Trial:
    """One method with one learning rate and rank, scored on validation data alone."""

    label: str
    lr: float
    rank: int
    entry: Entry

    @staticmethod
    def of(entry: Entry, lr: float, rank: int | None, rounds: int | None) -> "Trial":
        """The entry with these values; without a rank or rounds, with its own."""
        settings = entry.settings
        lora = lora_of(settings.method)
        lora = lora if rank is None else replace(lora, rank=rank)
        schedule = replace(settings.rounds, test=False, select="best")
        tried = replace(
            settings,
            method=replace(settings.method, lora=lora),  # type: ignore[type-var]
            training=replace(settings.training, lr=lr),
            rounds=schedule if rounds is None else replace(schedule, rounds=rounds),
        )
        label = f"{entry.label} lr={lr:g} rank={lora.rank}"
        return Trial(entry.label, lr, lora.rank, Entry(label, tried))

    def facts(self) -> dict[str, Any]:
        """What identifies the trial."""
        return {"method": self.label, "lr": self.lr, "rank": self.rank}

    def at_edge(self, trials: Sequence["Trial"]) -> bool:
        """Whether the rate is the least or the most that was tried, of several."""
        rates = sorted({trial.lr for trial in trials})
        return len(rates) > 1 and self.lr in (rates[0], rates[-1])


def tuned_table(file: Path, chosen: Mapping[str, Trial]) -> dict[str, Any]:
    """The comparison's own table with each method's best values in it."""
    table = read_table(file)
    for method in table["methods"]:
        trial = chosen[method.get("label", method["name"])]
        method["rank"] = trial.rank
        method["training"] = {**method.get("training", {}), "lr": trial.lr}
    return table


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table as a file of settings."""
    atomic_write(path, tomli_w.dumps(dict(table)).encode())
