"""Runs from Python: train, look at the record as frames and charts, let a client's model answer."""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedalt.runs.record import is_client, require_run

if TYPE_CHECKING:
    import altair
    import pandas

    from fedalt.models.base import Base
    from fedalt.report.records import Record

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Run:
    """A run in its folder, finished or not. Charts and frames need `fedalt[report]`."""

    path: Path

    def table(self, split: Split = "test") -> "pandas.DataFrame":
        """Scores by client, then their mean and the worst; columns as `fedalt run` prints them.

        Scores run from 0 to 100, losses are in nats. Raises ValueError where nothing was scored.
        """
        pandas = _pandas()
        from fedalt.report.table import run_table
        from fedalt.runs.folder import open_run

        table = run_table(open_run(self.path).lines(), split)
        rows = (*table.clients, table.mean, table.worst)
        columns: dict[str, list[Any]] = {"score": [row.metric for row in rows]}
        for at, column in enumerate(table.columns):
            columns[column] = [_only(row.scores[at]) for row in rows]
        if table.baseline:
            columns[f"gain over {table.baseline}"] = [_only(row.gain) for row in rows]
        index = pandas.Index([row.name for row in rows], name="client")
        return pandas.DataFrame(columns, index=index)

    def lines(self, kind: str | None = None) -> "pandas.DataFrame":
        """The record, a row for each line, all or of one kind: train, score, round and others.

        What lies within a line has a column of its own, such as `metrics.loss`.
        """
        pandas = _pandas()
        from fedalt.runs.folder import open_run

        lines = open_run(self.path).lines()
        kinds = dict.fromkeys(line["kind"] for line in lines)
        if kind is not None and kind not in kinds:
            raise ValueError(f"{self.path} has no lines of kind {kind!r}, but {', '.join(kinds)}")
        return pandas.json_normalize([line for line in lines if kind in (None, line["kind"])])

    def plot_losses(self, of: Literal["train", "validation"] = "validation") -> "altair.LayerChart":
        """Losses over the rounds, of every client and in the mean."""
        record = self._record()
        from fedalt.report.figures import learning_curves
        from fedalt.report.records import loss_rows

        rows = loss_rows(record, of)
        if not rows:
            raise ValueError(f"{self.path} has no {of} losses yet")
        return learning_curves(rows, f"{of} loss, nats")

    def plot_mixer(self) -> "altair.LayerChart":
        """How much the mixers weigh the first slot, over the rounds and for every client."""
        record = self._record()
        from fedalt.report.figures import mixer_curves
        from fedalt.report.records import mixer_record

        mixer = mixer_record(record)
        if mixer is None:
            raise ValueError(f"{self.path} has no record of a mixer")
        return mixer_curves(mixer)

    def plot_similarity(self) -> "altair.LayerChart":
        """How alike the clients' adapters are."""
        record = self._record()
        from fedalt.report.figures import similarity_map
        from fedalt.report.similarity import similarity

        match similarity(record):
            case str(why):
                raise ValueError(f"{self.path}: {why}")
            case similar:
                return similarity_map(similar)

    def plot_gains(self, split: Split = "test") -> "altair.LayerChart":
        """How much better each column is than the baseline, client by client."""
        record = self._record()
        from fedalt.report.compared_figures import gain_map
        from fedalt.report.table import run_table

        table = run_table(record.lines, split)
        return gain_map(table, table.baseline)

    def generate(self, client: str, text: str) -> str:
        """What a client's own model answers. The base model is loaded once and stays loaded."""
        from fedalt.flower.client_model import served
        from fedalt.runs.answers import answers

        (answer,) = answers(served(self.path, client, base=self._base), [text])
        return answer

    def export(self, client: str, out: str | Path) -> Path:
        """Write a client's model as a folder, which `fedalt.load` reads. Raises ValueError."""
        from fedalt.export.card import asked_as, card
        from fedalt.export.folders import export_personal
        from fedalt.flower.client_model import served

        of = served(self.path, client, base=self._base)
        readme = card(of, client, "fedalt")
        base = of.parts.base
        export_personal(of.serving, base, Path(out), readme=readme, asked=asked_as(of))
        return Path(out)

    @cached_property
    def _base(self) -> "Base":
        from fedalt.flower.client_model import client_at, load_base_of
        from fedalt.runs.answers import load_run_parts

        config = client_at(self.path)
        return load_run_parts(self.path).base if config is None else load_base_of(config)

    def _record(self) -> "Record":
        if find_spec("altair") is None:
            raise ValueError("altair is not installed: `pip install 'fedalt[report]'`")
        from fedalt.report.records import read_record

        return read_record(self.path)


def run(settings: Mapping[str, Any] | str | Path, *, out: str | Path) -> Run:
    """Train and test in a new folder.

    `settings` is a TOML file, or a nested dict of the same form, whose paths are relative to the
    current folder. What a user should know comes as warnings; what the built-in base model
    recommends for settings that were not given is printed to stderr. Raises ValueError for settings
    or data that cannot be used. A run that was stopped goes on with `fedalt resume`.
    """
    from fedalt.report.learning import nothing_learnt
    from fedalt.runs.beginning import require_unused
    from fedalt.runs.lifecycle import start_run
    from fedalt.runs.settings import advised_settings, settings_of, to_toml
    from fedalt.runs.settings_file import rooted
    from fedalt.runs.setup import prepare
    from fedalt.training.recommended import recommended

    if isinstance(settings, Mapping):
        filled, advice = recommended(rooted(settings, Path()))
        read = settings_of(filled, "the settings")
    else:
        read, advice = advised_settings(Path(settings))
    require_unused(Path(out), to_toml(read))
    prepared = prepare(read)
    if advice:
        print(advice, file=sys.stderr)
    for sentence in prepared.warnings:
        warnings.warn(sentence, stacklevel=2)
    start_run(prepared, Path(out))
    if sentence := nothing_learnt(Path(out)):
        warnings.warn(sentence, stacklevel=2)
    return Run(Path(out))


def open_run(path: str | Path) -> Run:
    """A run that is there already, finished or not. Raises ValueError where it is none.

    The folder of a federation's server is one, but for its clients' models. Of a federation's
    client, named by its client.toml, there is the model alone: `generate` and `export`.
    """
    folder = Path(path)
    if (folder / "run.json").is_file() and not is_client(folder):
        require_run(folder)
        return Run(folder)
    from fedalt.flower.client_model import client_at

    if client_at(folder) is None:
        require_run(folder)
    return Run(Path(path))


def _pandas() -> Any:
    """The module: `import fedalt` does without it."""
    if find_spec("pandas") is None:
        raise ValueError("pandas is not installed: `pip install 'fedalt[report]'`")
    import pandas

    return pandas


def _only(values: tuple[float, ...]) -> float | None:
    """The number of a cell of a single run, if there is one."""
    return values[0] if values else None
