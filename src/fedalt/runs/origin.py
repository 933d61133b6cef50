"""Where a cell of a comparison comes from: the settings that count, and what stands for the code.

Paths and devices do not count, but the content of the data and of the base model does; so a cell
that was computed on another machine is found to be the same one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import torch

from fedalt.core.files import atomic_write, make_private_folder
from fedalt.core.reading import StoreError, read_json
from fedalt.core.settings import DataSettings, ModelSettings
from fedalt.data.folder import open_data
from fedalt.data.prompts import read_template
from fedalt.data.records import Columns
from fedalt.methods import METHODS
from fedalt.runs.cells import Cell, named
from fedalt.runs.compare import Entry, Job
from fedalt.runs.folder import open_run
from fedalt.runs.kept_settings import Tables, that_count
from fedalt.runs.rehearsal import difference, rehearse
from fedalt.runs.settings import Settings, settings_of
from fedalt.runs.setup import base_of

_PRINTS: Final = {"data": ("fingerprint", "template"), "model": ("fingerprint",)}


@dataclass(frozen=True)
class Origin:
    """What a cell of a method would be made of now, whatever its seed.

    `rehearsal` is None where nobody has rehearsed: then the settings alone are compared, without
    the content of data and base model.
    """

    settings: Tables
    rehearsal: Sequence[float] | None = None

    @property
    def numbers(self) -> Sequence[float]:
        """The rehearsal of a method that has been rehearsed."""
        assert self.rehearsal is not None
        return self.rehearsal

    def require(self, cell: Cell, file: Path) -> None:
        """Raise StoreError, which names the cell and what differs, for one of another origin."""
        then = {section: dict(table) for section, table in cell.settings.items()}
        if self.rehearsal is None:
            for section, keys in _PRINTS.items():
                for key in keys:
                    then.get(section, {}).pop(key, None)
        told = next(_unlike(then, self.settings), "")
        if told:
            told = f"was made with other settings: {told}"
        elif self.rehearsal is not None and (unlike := difference(cell.rehearsal, self.rehearsal)):
            told = (
                f"was made by code (fedalt {cell.fedalt}) that does not do the same: of the "
                f"method's rehearsal, {unlike}"
            )
        if told:
            raise StoreError(
                f"{file}: the cell {named(cell.key)} {told}; take another --results file, or "
                "delete the cell's line, and it is computed anew"
            )


def origins_of(entries: Sequence[Entry]) -> Iterator[tuple[str, Origin]]:
    """The origin of each method's cells now, by label, one after the other.

    Data are read, base models loaded and methods rehearsed, each once.
    """
    known: dict[tuple[DataSettings, ModelSettings], tuple[Tables, bool]] = {}
    for entry in entries:
        settings = entry.settings
        what = settings.data, settings.model
        if what not in known:
            known[what] = _content(*what)
        prints, classifier = known[what]
        rehearsal = rehearse(settings, classifier=classifier)
        yield entry.label, Origin(that_count(settings, prints), rehearsal)


def settings_in(path: Path, settings: Settings) -> Tables:
    """The settings of a finished run that count, with what its run.json says of the content."""
    facts = open_run(path).facts()
    data, model = facts["data"], facts["model"]
    prints = _prints(data["fingerprint"], data["template"], model["fingerprint"])
    return that_count(settings, prints)


def note_origin(job: Job, rehearsal: Sequence[float]) -> None:
    """Write the rehearsal beside a run that begins, or raise StoreError if it began with another.

    So a run that was stopped does not go on with code that does something else.
    """
    file = job.path.with_suffix(".rehearsal.json")
    if file.exists():
        if unlike := difference(read_json(file, list[float]), rehearsal):
            raise StoreError(
                f"{job.path} was begun by code that does not do the same: of the method's "
                f"rehearsal, {unlike}; take another --out, or delete that folder and {file.name}"
            )
    elif not job.is_begun:
        make_private_folder(file.parent)
        atomic_write(file, json.dumps(rehearsal).encode())


def _content(data: DataSettings, model: ModelSettings) -> tuple[Tables, bool]:
    """Fingerprints of what the settings name, and whether the data are for a classifier."""
    folder = open_data(data.path, Columns.of(data))
    template, fingerprint = read_template(data.template), base_of(model, folder.labels).fingerprint
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the runs that follow are processes with a model of their own
    prints = _prints(folder.fingerprint, template.text, fingerprint)
    return prints, folder.kind == "classify"


def _prints(data: str, template: str, model: str) -> Tables:
    digest = sha256(template.encode()).hexdigest()[:16]
    return {
        "data": {"fingerprint": data[:16], "template": digest},
        "model": {"fingerprint": model},
    }


def _unlike(then: Tables, now: Tables) -> Iterator[str]:
    """Each setting that is another one; what a cell does not tell was the default."""
    name = now["method"]["name"]
    bare = {"data": {"path": "."}, "method": {"name": name}}
    usual = that_count(settings_of(bare, "the defaults"))
    switches = {"method": METHODS.entries[name].settings}  # a method's and its ablations'
    for section in sorted({*then, *now}):
        before = {**usual.get(section, {}), **then.get(section, {})}
        after = now.get(section, {})
        for key in sorted({*before, *after}):
            usually = switches.get(section, {}).get(key)
            was, is_ = before.get(key, usually), after.get(key, usually)
            if was != is_:
                yield f"[{section}] {key} was {was}, is {is_}"
