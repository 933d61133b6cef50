"""What a run's folder has on record, as rows for charts: numbers of 4 digits, one fact per row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedalt.runs.folder import RunFolder, open_run
from fedalt.runs.settings import read_table

Line = Mapping[str, Any]
Rows = list[dict[str, Any]]

DIGITS = 4


@dataclass(frozen=True)
class Record:
    """A run as it was written down; `examples` are test examples, none where none were kept."""

    folder: RunFolder
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    lines: Sequence[Line]
    examples: Sequence[Line]

    def of(self, kind: str) -> list[Line]:
        """The lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def split(self) -> str | None:
        """The data that tables are of: test, or else validation; None before any scoring."""
        seen = {line["split"] for line in self.of("score")}
        return next((split for split in ("test", "validation") if split in seen), None)


def read_record(path: Path) -> Record:
    """Read what is committed. Raises StoreError for a folder that is no run's."""
    folder = open_run(path)
    return Record(
        folder=folder,
        facts=folder.facts(),
        settings=read_table(path / "settings.toml"),
        lines=folder.lines(),
        examples=folder.examples(),
    )


def short(number: float) -> float:
    """The number to 4 significant digits: no chart shows more."""
    return float(f"{number:.{DIGITS}g}")


def loss_rows(record: Record, part: str) -> Rows:
    """Mean losses of an answer's token by round, client and column; `part` is train or validation.

    The shared column has no curve: it is scored once, at the end.
    """
    kind, split = ("train", None) if part == "train" else ("score", part)
    return [
        {
            "round": line["round"] + 1,
            "client": line["client"],
            "column": line["column"],
            "loss": short(line["metrics"]["loss"]),
        }
        for line in record.of(kind)
        if line.get("split") == split and "loss" in line["metrics"]
    ]


def cost_rows(record: Record) -> Rows:
    """Seconds of training and bytes by round, client and column."""
    return [
        {
            "round": line["round"] + 1,
            "client": line["client"],
            "column": line["column"],
            "seconds": short(line["seconds"]),
            "upload": line["upload_bytes"],
            "download": line["download_bytes"],
        }
        for line in record.of("train")
    ]


def round_rows(record: Record) -> Rows:
    """Seconds and peak memory (MB) of each round, scoring included."""
    return [
        {
            "round": line["round"] + 1,
            "seconds": short(line["seconds"]),
            "memory": short(line["peak_memory_bytes"] / 1e6),
        }
        for line in record.of("round")
    ]


@dataclass(frozen=True)
class MixerRecord:
    """The weight of the first slot, from 0 to 1, in means over tokens.

    `layers` by round and layer and `clients` by round and client; `sites` by layer and kind of
    site and `tokens` (shares of all weights in equal bins) by client, both of the last round.
    """

    slots: Sequence[str]
    round: int
    layers: Rows
    clients: Rows
    sites: Rows
    tokens: Rows


def mixer_record(record: Record) -> MixerRecord | None:
    """What a run's lines tell of its mixers, on validation data or else on test data."""
    lines = record.of("mixer")
    split = "validation" if any(line["split"] == "validation" for line in lines) else "test"
    lines = [line for line in lines if line["split"] == split]
    if not lines:
        return None
    last = max(line["round"] for line in lines)
    newest = {line["client"]: line for line in lines if line["round"] == last}
    return MixerRecord(
        slots=lines[-1]["slots"],
        round=last + 1,
        layers=_means(
            {"round": line["round"] + 1, "layer": site_parts(site)[0]} | {"weight": weights[0]}
            for line in lines
            for site, weights in line["weights"].items()
        ),
        clients=[
            {
                "round": line["round"] + 1,
                "client": line["client"],
                "weight": short(fmean(weights[0] for weights in line["weights"].values())),
            }
            for line in lines
        ],
        sites=_means(
            {**dict(zip(("layer", "site"), site_parts(site), strict=True)), "weight": weights[0]}
            for line in newest.values()
            for site, weights in line["weights"].items()
        ),
        tokens=[row for line in newest.values() for row in _shares(line)],
    )


def site_parts(site: str) -> tuple[str, str]:
    """The layer's number and the name within the layer, as far as a module path has numbers."""
    parts = site.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ("–", site) if at is None else (parts[at], parts[-1])


def _shares(line: Line) -> Iterator[dict[str, Any]]:
    counts = line["histogram"]
    whole = sum(counts) or 1
    for index, count in enumerate(counts):
        middle = (index + 0.5) / len(counts)
        yield {"client": line["client"], "weight": short(middle), "share": short(count / whole)}


def _means(rows: Iterable[dict[str, Any]]) -> Rows:
    """The mean weight of the rows that agree in everything else, in the order of their coming."""
    sums: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for row in rows:
        weight = row.pop("weight")
        total = sums.setdefault(tuple(row.items()), [0.0, 0.0])
        total[0] += weight
        total[1] += 1
    return [{**dict(key), "weight": short(total / many)} for key, (total, many) in sums.items()]
