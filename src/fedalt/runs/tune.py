"""Successive halving over any settings of methods: the same trials and rounds for every method.

All trials of a method begin with few rounds. The better half, by the loss on validation data, goes
on with twice as many, and so on until the last ones have all rounds. With a single stage, as where
the last round is tested, it is a grid. Test data are never read.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf, isfinite
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import tomli_w

from fedalt.core.files import atomic_write
from fedalt.core.settings import Schedule, Stay
from fedalt.engine.members import Members
from fedalt.engine.robust import central_loss
from fedalt.runs.compare import Entry
from fedalt.runs.folder import open_run
from fedalt.runs.settings import SettingsError, lora_of, read_table, settings_of
from fedalt.runs.steps import with_equal_steps
from fedalt.training.recommended import recommended

Losses = Sequence[float]  # of a trial after each stage that it took part in; inf where it failed


class Stage(NamedTuple):
    """So many trials of every method have so many rounds at its end, those of before included."""

    trials: int
    rounds: int


@dataclass(frozen=True)
class Trial:
    """One method with values of some of its settings, scored on validation data alone.

    `values` are by the name of a setting; "lr" is that of its training. With equal steps a method
    that trains more than once a round, or before it serves, has fewer rounds than are asked for.
    """

    label: str
    values: Mapping[str, Any]
    entry: Entry
    equal_steps: bool = True

    @staticmethod
    def of(entry: Entry, values: Mapping[str, Any], *, equal_steps: bool = True) -> "Trial":
        """The entry with these values."""
        said, settings = dict(entry.said), entry.settings
        method = {name: value for name, value in values.items() if name != "lr"}
        said["method"] = {**said["method"], **method}
        if "lr" in values:
            said["training"] = {**said.get("training", {}), "lr": values["lr"]}
        filled, _ = recommended(said)  # an alpha that nobody gave follows the rank
        wanted = settings_of(filled, entry.label)
        tried = replace(
            settings,
            method=wanted.method,
            training=replace(settings.training, lr=wanted.training.lr),
            rounds=replace(settings.rounds, test=False),
        )
        label = " ".join([entry.label, *(f"{name}={value}" for name, value in values.items())])
        return Trial(entry.label, values, Entry(label, tried), equal_steps)

    def after(self, rounds: int) -> Entry:
        """What is run to have so many rounds, or as many steps as a plain method takes in them."""
        entry = self.entry.lasting(rounds)
        if self.equal_steps:
            return replace(entry, settings=with_equal_steps(entry.settings))
        return entry

    def facts(self) -> dict[str, Any]:
        """What identifies the trial."""
        settings = self.entry.settings
        usual = {"lr": settings.training.lr, "rank": lora_of(settings.method).rank}
        return {"method": self.label, **usual, **self.values}

    def at_edge(self, trials: Sequence["Trial"]) -> bool:
        """Whether a number is the least or the most that was tried, of several."""
        for name, value in self.values.items():
            tried = [t.values[name] for t in trials if t.label == self.label]
            numbers = [v for v in tried if isinstance(v, int | float) and not isinstance(v, bool)]
            if len(set(numbers)) > 1 and value in (min(numbers), max(numbers)):
                return True
        return False


def trials_of(
    entries: Sequence[Entry],
    flags: Mapping[str, Sequence[Any]],
    trials: int | None,
    seed: int,
    *,
    equal_steps: bool = True,
) -> list[Trial]:
    """As many trials of every method: all its combinations, or so many of them, drawn by the seed.

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
        Trial.of(entry, values, equal_steps=equal_steps)
        for entry in entries
        for values in _drawn(every[entry.label], count, seed)
    ]


def _drawn(combinations: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """So many of them, in their order, the same ones every time."""
    chosen = sorted(Random(seed).sample(range(len(combinations)), count))
    return [combinations[at] for at in chosen]


def numbers_in(file: Path) -> tuple[int | None, int | None]:
    """The trials and the stages that a comparison's file asks for, if any. Raises SettingsError."""
    table = read_table(file).get("tune", {})
    numbers = table.get("trials"), table.get("stages")
    for name, number in zip(("trials", "stages"), numbers, strict=True):
        if number is not None and (type(number) is not int or number < 1):
            raise SettingsError(f"{file}: [tune] {name}: expected a whole number above 0")
    return numbers


def rounds_of(entries: Sequence[Entry]) -> int:
    """How many rounds every method has. Raises SettingsError where they differ."""
    rounds = {entry.label: entry.settings.rounds.rounds for entry in entries}
    if len(set(rounds.values())) > 1:
        told = ", ".join(f"{label} {number}" for label, number in rounds.items())
        raise SettingsError(f"methods have different numbers of rounds ({told}); give --rounds")
    return next(iter(rounds.values()))


def is_planned(entries: Iterable[Entry]) -> bool:
    """Whether a method's noise is solved for all its rounds, so that none can be added later."""
    return any(entry.settings.privacy.epsilon is not None for entry in entries)


def needs_all_rounds(entries: Iterable[Entry]) -> bool:
    """Whether few rounds say nothing of the one that is tested.

    Where that is the last, however its loss has risen by then, the learning rate that is best for
    few rounds is the first that overfits later; where clients join or leave, few rounds are of
    other clients.
    """
    return any(e.settings.rounds.select == "last" or e.settings.clients for e in entries)


def stages_of(
    trials: int, rounds: int, wanted: int | None = None, *, whole: bool = False
) -> list[Stage]:
    """Half as many trials and twice as many rounds from stage to stage, up to all rounds.

    At least two of several trials get there, for a choice between models of full length. Without a
    number there are as many stages as that allows, a single one where trials cannot go on
    (`whole`). Raises SettingsError for more.
    """
    most = 1 if whole else min(max(trials // 2, 1).bit_length(), rounds.bit_length())
    count = most if wanted is None else wanted
    if count > most:
        why = ", as [privacy] epsilon is spent in the rounds of the first" if whole else ""
        raise SettingsError(
            f"stages = {count}, but {trials} trials of {rounds} rounds have at most {most}{why}"
        )
    return [Stage(-(-trials // 2**at), rounds // 2 ** (count - 1 - at)) for at in range(count)]


def budget_of(stages: Sequence[Stage]) -> str:
    """What every method gets, in a sentence."""
    first, *others = stages
    words = [f"{first.trials} trials of {_rounds(first.rounds)}"]
    words += [f"the best {stage.trials} of them up to {_rounds(stage.rounds)}" for stage in others]
    before = [0, *(stage.rounds for stage in stages)]
    total = sum(stage.trials * (stage.rounds - b) for stage, b in zip(stages, before, strict=False))
    return f"every method: {', '.join(words)}; {_rounds(total)} in all"


def _rounds(number: int) -> str:
    return f"{number} round{'s' * (number > 1)}"


def halve(
    trials: Sequence[Trial],
    stages: Sequence[Stage],
    score: Callable[[Sequence[Trial], int], Sequence[float]],
) -> list[Losses]:
    """The losses of each trial, stage by stage; `score` brings trials to so many rounds.

    A trial that failed does not go on.
    """
    losses: list[list[float]] = [[] for _ in trials]
    staying = list(range(len(trials)))
    for stage in stages:
        by_label: dict[str, list[int]] = {}
        for at in sorted(staying, key=lambda at: losses[at][-1:]):
            if losses[at][-1:] != [inf]:
                by_label.setdefault(trials[at].label, []).append(at)
        staying = sorted(at for ranked in by_label.values() for at in ranked[: stage.trials])
        scores = score([trials[at] for at in staying], stage.rounds)
        for at, loss in zip(staying, scores, strict=True):
            losses[at].append(loss)
    return list(losses)


def validation_loss(run: Path, schedule: Schedule, stays: Mapping[str, Stay]) -> float | None:
    """The validation loss of the round that a run so long would be tested at; None without any.

    By its record, because the run itself may have gone on since. A round before the last change of
    clients is not tested.
    """
    since = Members((), stays).changed(schedule.rounds - 1)
    by_round: dict[int, list[float]] = {}
    for line in open_run(run).lines():
        if line["kind"] == "score" and line["split"] == "validation" and line["column"] == "own":
            by_round.setdefault(line["round"], []).append(line["metrics"]["loss"])
    of_round = [
        central_loss(losses)
        for at, losses in sorted(by_round.items())
        if since <= at < schedule.rounds
    ]
    if not of_round:
        return None
    return min(of_round) if schedule.select == "best" else of_round[-1]


def best_of(trials: Sequence[Trial], losses: Sequence[Losses]) -> dict[str, Trial]:
    """Each method's trial of full length with the lowest loss, the first of several, by label.

    A method of which no such trial succeeded is left out.
    """
    chosen: dict[str, Trial] = {}
    full = max(map(len, losses))
    pairs = zip(trials, losses, strict=True)
    for trial, of_trial in sorted(pairs, key=lambda pair: pair[1][-1]):
        if len(of_trial) == full and isfinite(of_trial[-1]):
            chosen.setdefault(trial.label, trial)
    return chosen


def write_tuned(
    out: Path,
    file: Path,
    trials: Sequence[Trial],
    losses: Sequence[Losses],
    stages: Sequence[Stage],
) -> list[dict[str, Any]]:
    """Write OUT/tune.jsonl and OUT/tuned.toml, the comparison's file with the best values."""
    lines = [
        {
            **trial.facts(),
            "rounds": trial.after(stages[len(of_trial) - 1].rounds).settings.rounds.rounds,
            "validation_loss": None if of_trial[-1] == inf else of_trial[-1],
        }
        for trial, of_trial in zip(trials, losses, strict=True)
    ]
    write_toml(out / "tuned.toml", tuned_table(file, best_of(trials, losses)))
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    atomic_write(out / "tune.jsonl", text.encode())
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
