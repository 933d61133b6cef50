"""The trials of a small search over any settings of methods, as many for every method."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

from fedalt.core.files import atomic_write
from fedalt.methods.lora import Lora
from fedalt.runs.compare import Entry
from fedalt.runs.settings import SettingsError, lora_of, read_table

_SIZES = tuple(Lora.__dataclass_fields__)


@dataclass(frozen=True)
class Trial:
    """One method with values of some of its settings, scored on validation data alone.

    `values` are by the name of a setting; "lr" is that of its training.
    """

    label: str
    values: Mapping[str, Any]
    entry: Entry

    @staticmethod
    def of(entry: Entry, values: Mapping[str, Any], rounds: int | None) -> "Trial":
        """The entry with these values and, without rounds, with its own."""
        settings = entry.settings
        sizes = {name: values[name] for name in _SIZES if name in values}
        own = {name: value for name, value in values.items() if name not in (*_SIZES, "lr")}
        lora = replace(lora_of(settings.method), **sizes)
        schedule = replace(settings.rounds, test=False, select="best")
        tried = replace(
            settings,
            method=replace(settings.method, lora=lora, **own),  # type: ignore[type-var]
            training=replace(settings.training, lr=values.get("lr", settings.training.lr)),
            rounds=schedule if rounds is None else replace(schedule, rounds=rounds),
        )
        label = " ".join([entry.label, *(f"{name}={value}" for name, value in values.items())])
        return Trial(entry.label, values, Entry(label, tried))

    def facts(self) -> dict[str, Any]:
        """What identifies the trial."""
        settings = self.entry.settings
        usual = {"lr": settings.training.lr, "rank": lora_of(settings.method).rank}
        return {"method": self.label, **usual, **self.values}

    def at_edge(self, trials: Sequence["Trial"]) -> bool:
        """Whether a number is the least or the most that was tried, of several."""
        for name, value in self.values.items():
            tried = {t.values[name] for t in trials if t.label == self.label}
            numbers = [v for v in tried if isinstance(v, int | float) and not isinstance(v, bool)]
            if len(numbers) > 1 and value in (min(numbers), max(numbers)):
                return True
        return False


def trials_of(
    entries: Sequence[Entry],
    flags: Mapping[str, Sequence[Any]],
    trials: int | None,
    rounds: int | None,
) -> list[Trial]:
    """As many trials of every method: all its combinations, or so many of them, drawn once.

    `flags` are tried by every method, over what its own grid says of the same setting. Raises
    SettingsError where nothing is to be tried or methods would have different numbers of trials.
    """
    every: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        grid = {**entry.tune, **flags}
        every[entry.label] = [
            dict(zip(grid, values, strict=True)) for values in product(*grid.values())
        ]
    sizes = {label: len(combinations) for label, combinations in every.items()}
    if max(sizes.values()) == 1:
        raise SettingsError("there is nothing to try: give --lr, or lists of values in [tune]")
    told = ", ".join(f"{label} {size}" for label, size in sizes.items())
    if trials is None and len(set(sizes.values())) > 1:
        raise SettingsError(
            f"methods would have different numbers of trials ({told}); set trials = "
            f"{min(sizes.values())} in [tune], and each tries so many, drawn at random"
        )
    count = max(sizes.values()) if trials is None else trials
    if count > min(sizes.values()):
        raise SettingsError(f"[tune] trials = {count}, but the methods' combinations are {told}")
    return [
        Trial.of(entry, values, rounds)
        for entry in entries
        for values in _drawn(every[entry.label], count)
    ]


def _drawn(combinations: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many of them, in their order, the same ones every time."""
    chosen = sorted(Random(0).sample(range(len(combinations)), count))
    return [combinations[at] for at in chosen]


def trials_in(file: Path) -> int | None:
    """How many trials a comparison's file asks for, if it says so. Raises SettingsError."""
    trials = read_table(file).get("tune", {}).get("trials")
    if trials is not None and (type(trials) is not int or trials < 1):
        raise SettingsError(f"{file}: [tune] trials: expected a whole number above 0")
    return trials


def best_of(trials: Sequence[Trial], losses: Sequence[float]) -> dict[str, Trial]:
    """The trial of each method with the lowest validation loss, the first of several, by label."""
    chosen: dict[str, Trial] = {}
    for trial, _ in sorted(zip(trials, losses, strict=True), key=lambda pair: pair[1]):
        chosen.setdefault(trial.label, trial)
    return chosen


def write_tuned(
    out: Path, file: Path, trials: Sequence[Trial], losses: Sequence[float]
) -> list[dict[str, Any]]:
    """Write OUT/tune.jsonl and OUT/tuned.toml, the comparison's file with the best values."""
    lines = [
        {**trial.facts(), "validation_loss": loss}
        for trial, loss in zip(trials, losses, strict=True)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    atomic_write(out / "tune.jsonl", text.encode())
    write_toml(out / "tuned.toml", tuned_table(file, best_of(trials, losses)))
    return lines


def tuned_table(file: Path, chosen: Mapping[str, Trial]) -> dict[str, Any]:
    """The comparison's own table with each method's best values in it."""
    table = read_table(file)
    table.pop("tune", None)
    for method in table["methods"]:
        method.pop("tune", None)
        values = dict(chosen[method.get("label", method["name"])].values)
        if "lr" in values:
            method["training"] = {**method.get("training", {}), "lr": values.pop("lr")}
        method.update(values)
    return table


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table as a file of settings."""
    atomic_write(path, tomli_w.dumps(dict(table)).encode())
