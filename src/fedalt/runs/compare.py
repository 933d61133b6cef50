"""Several methods under one budget: each method and seed is a run of its own, none runs twice."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedalt.core.files import atomic_write, make_private_folder, open_private
from fedalt.core.threads import cores
from fedalt.methods import METHODS
from fedalt.methods.lora import Lora
from fedalt.runs.folder import open_run
from fedalt.runs.settings import Settings, SettingsError, read_table, settings_of, to_toml
from fedalt.runs.view import VIEW, view_of
from fedalt.training.recommended import recommended

_OVERRIDES = ("data", "model", "training", "rounds", "scoring", "traffic", "privacy")
_LABEL = re.compile(r"[\w][\w .,=+()-]{,79}")  # it becomes a folder's name


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a method with all its settings, but for the seed.

    `tune` holds the values that `fedalt tune` tries, by the name of a setting; `said` is the table
    of settings as its file has it.
    """

    label: str
    settings: Settings
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    advice: str = ""  # what was taken of the base model's recommended settings, in a sentence
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The label as a name of a folder."""
        return folder_of(self.label)

    def lasting(self, rounds: int) -> "Entry":
        """The same with so many rounds."""
        schedule = replace(self.settings.rounds, rounds=rounds)
        return replace(self, settings=replace(self.settings, rounds=schedule))


@dataclass(frozen=True)
class Job:
    """One run of a comparison and its place."""

    entry: Entry
    seed: int
    path: Path

    @property
    def settings(self) -> Settings:
        """The entry's settings with this seed; local-only and base are rows of their own."""
        settings = self.entry.settings
        scoring = replace(settings.scoring, base=False)
        return replace(settings, seed=self.seed, scoring=scoring, local_baseline=False)

    @property
    def is_begun(self) -> bool:
        """Whether its folder is that of a run by now."""
        return (self.path / "run.json").exists()


def read_comparison(file: Path) -> tuple[tuple[Entry, ...], tuple[int, ...]]:
    """The methods and the seeds of a comparison's file; everything is checked. SettingsError."""
    table = read_table(file)
    view_of(table, str(file))  # so that a mistake in it is found first of all
    for key in VIEW:
        table.pop(key, None)
    seeds = table.pop("seeds", [0])
    if not _are_seeds(seeds):
        raise SettingsError(f"{file}: seeds: expected a list of different whole numbers")
    listed = table.pop("methods", None)
    if not isinstance(listed, list) or not listed or not all(isinstance(e, dict) for e in listed):
        raise SettingsError(f"{file}: expected at least one [[methods]] with a name")
    for key in ("method", "seed", "local_baseline"):
        if key in table:
            raise SettingsError(
                f"{file}: {key!r} belongs to a single run; see [[methods]] and seeds"
            )
    entries = tuple(
        _entry(table, method, f"{file}: [[methods]] {n}") for n, method in enumerate(listed, 1)
    )
    for at, entry in enumerate(entries):
        if entry.folder in (other.folder for other in entries[:at]):
            raise SettingsError(f"{file}: two methods are called {entry.label!r}; give one a label")
    return entries, tuple(seeds)


def folder_of(label: str) -> str:
    """The folder of a method's runs below that of the comparison."""
    return re.sub(r"[^\w.=+-]+", "-", label).strip("-").lower()


def jobs_of(entries: Sequence[Entry], seeds: Sequence[int], out: Path) -> list[Job]:
    """All runs, seed by seed, so that a comparison that is stopped has whole seeds."""
    return [
        Job(entry, seed, out / entry.folder / f"seed-{seed}") for seed in seeds for entry in entries
    ]


def write_settings(job: Job) -> Path:
    """Write a run's settings beside its folder, where a report finds those of a run that is not."""
    file = job.path.with_suffix(".toml")
    make_private_folder(file.parent)
    atomic_write(file, to_toml(job.settings).encode())
    return file


def run_all(
    jobs: Sequence[Job], workers: int, tick: float = 30.0
) -> Generator[tuple[Job, str | None] | None, None, None]:
    """Bring every run to its end, so many at a time; each as it ends, with what went wrong.

    None comes in between where nothing ends for `tick` seconds. Every run is a process of its own
    with its share of the cores; the last runs, which are fewer than the workers, share all of them.
    Closing the iterator, as an interrupt does, stops the processes where `fedalt resume` takes up
    again.
    """
    last = len(jobs) % workers
    running: list[subprocess.Popen[bytes]] = []

    def cores_of(at: int) -> int:
        return max(1, cores() // (last if at >= len(jobs) - last else workers))

    with ThreadPoolExecutor(workers) as pool:
        waiting = {
            pool.submit(_run, job, cores_of(at), running.append): job for at, job in enumerate(jobs)
        }
        try:
            while waiting:
                done, _ = wait(waiting, timeout=tick, return_when=FIRST_COMPLETED)
                if not done:
                    yield None
                for future in done:
                    yield waiting.pop(future), future.result()
        finally:
            for future in waiting:
                future.cancel()
            for process in running:
                if process.poll() is None:
                    process.terminate()


def rounds_done(jobs: Sequence[Job]) -> int:
    """How many rounds of all these runs are committed, also while they go on."""
    return sum(open_run(job.path).rounds_done() for job in jobs if job.is_begun)


def default_workers(jobs: Sequence[Job]) -> int:
    """One run per core, or a single one where they share a GPU; however many are left to do.

    The number of threads a run gets is part of what its bits depend on; only the last runs of
    `run_all` get more.
    """
    import torch  # a comparison's page, which needs no tensors, names runs as this module does

    wanted = {job.settings.model.device for job in jobs}
    on_gpu = wanted != {"cpu"} and torch.cuda.is_available()
    return 1 if on_gpu else cores()


def _run(job: Job, threads: int, started: Callable[[subprocess.Popen[bytes]], None]) -> str | None:
    """One run to its end; its last words if it did not get there."""
    words = ["resume", str(job.path), "--rounds", str(job.settings.rounds.rounds)]
    if not job.is_begun:
        config = write_settings(job)
        words = ["run", str(config), "--out", str(job.path)]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    log = job.path.with_suffix(".log")
    with open_private(log, "ab") as file:
        began = file.tell()
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "fedalt", *words],
            stdout=file,
            stderr=file,
            env={**os.environ, **limits},
        )
        started(process)
        code = process.wait()
    if code == 0:
        return None
    said = log.read_bytes()[began:].decode(errors="replace").splitlines()
    errors = [line for line in said if line.startswith("error:")]
    return errors[-1] if errors else f"it ended with exit code {code}"


def _entry(common: Mapping[str, Any], given: Mapping[str, Any], place: str) -> Entry:
    """A method's own table over the common one."""
    table = dict(common)
    for section in _OVERRIDES:
        if section in given:
            if not isinstance(given[section], dict):
                raise SettingsError(f"{place}: [methods.{section}]: expected a section")
            if isinstance(shared := common.get(section, {}), dict):  # else it is refused below
                table[section] = {**shared, **given[section]}
    other = (*_OVERRIDES, "label", "tune")
    method = {key: value for key, value in given.items() if key not in other}
    if "name" not in method:
        raise SettingsError(f"{place}: name is missing")
    tried = table.pop("tune", {})
    whole = {**table, "method": method}
    settings_of(whole, place)  # an error is about what the user has written
    label = given.get("label", method["name"])
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise SettingsError(
            f"{place}: label: expected at most 80 letters, digits and plain signs, got {label!r}"
        )
    filled, advice = recommended(whole)
    grid = _grid(tried, given.get("tune", {}), table, method, place)
    return Entry(label, settings_of(filled, place), grid, advice, whole)


def _grid(
    shared: object, own: object, table: Mapping[str, Any], method: Mapping[str, Any], place: str
) -> dict[str, tuple[Any, ...]]:
    """The values to try of a method's settings, each of them checked."""
    if not isinstance(shared, dict) or not isinstance(own, dict):
        raise SettingsError(f"{place}: tune: expected a section of settings with lists of values")
    known = ("lr", *Lora.__dataclass_fields__, *METHODS.entries[method["name"]].settings)
    common = {key: values for key, values in shared.items() if key not in ("trials", "stages")}
    grid = {**common, **own}
    for name, values in grid.items():
        where = f"{place}: [tune] {name}"
        if name not in known:
            raise SettingsError(
                f"{where}: method {method['name']!r} has no such setting, only {', '.join(known)}"
            )
        if not isinstance(values, list) or not values:
            raise SettingsError(f"{where}: expected a list of values to try, got {values!r}")
        for value in values:
            part = {"training": {**table.get("training", {}), "lr": value}, "method": method}
            if name != "lr":
                part = {"method": {**method, name: value}}
            settings_of({**table, **part}, where)
    return {name: _different(values) for name, values in grid.items()}


def _different(values: Sequence[Any]) -> tuple[Any, ...]:
    """Each of them once; tables, as those of ranks, are not hashable."""
    return tuple(value for at, value in enumerate(values) if value not in values[:at])


def _are_seeds(seeds: object) -> bool:
    return (
        isinstance(seeds, list)
        and bool(seeds)
        and all(type(seed) is int for seed in seeds)
        and len(set(seeds)) == len(seeds)
    )
