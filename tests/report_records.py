"""Records of runs for tests of reports: a mixer's lines, test examples, a large run."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedalt.core.digests import digest_of
from fedalt.runs.standing import read_digests, read_standing, seal_of_facts, write_standing

SLOTS = ["individual", "rest_of_world"]
SITES = [f"model.layers.{n}.{part}_proj" for n in range(4) for part in ("q", "k", "v", "up")]


def mixer_line(client: str, round_: int, weights: dict[str, float], split: str = "validation"):
    """A line of a mixer whose first slot weighs so much at each site."""
    histogram = [0] * 20
    for weight in weights.values():
        histogram[min(int(weight * 20), 19)] += 10
    return {
        "kind": "mixer",
        "split": split,
        "round": round_,
        "client": client,
        "column": "own",
        "slots": SLOTS,
        "weights": {site: [weight, 1 - weight] for site, weight in weights.items()},
        "histogram": histogram,
    }


def example_line(client: str, number: int, **over: Any) -> dict[str, Any]:
    """A test example with colours for its tokens; its loss is its number."""
    words = f"Is {number} an even number, or is it an odd one?".split()
    return {
        "client": client,
        "column": "own",
        "round": 1,
        "prompt": " ".join(words),
        "reference": "yes",
        "prediction": "no",
        "loss": float(number),
        "tokens": [[word + " ", at / len(words)] for at, word in enumerate(words)],
        "slots": SLOTS,
    } | over


def append_lines(run: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines to a run's record, committed."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with (run / "rounds.jsonl").open("a") as file:
        file.write(text)
    recommit(run)


def recommit(run: Path, **over: Any) -> None:
    """Let the record, the facts and the examples of a run count as they lie there now."""
    record, examples = run / "rounds.jsonl", run / "examples.jsonl"
    standing = read_standing(run)
    digests = read_digests(run, standing)
    digests.forget(examples)
    if examples.exists():
        digests.note(examples, digest_of(examples.read_bytes()))
    data = record.read_bytes() if record.exists() else b""
    now = {
        "record_bytes": len(data),
        "record_sha256": digest_of(data),
        "facts": (seal_of_facts(json.loads((run / "run.json").read_text())),),
    }
    write_standing(run, replace(standing, **{**now, **over}), digests)


def write_examples(run: Path, lines: Sequence[dict[str, Any]]) -> None:
    """The file of test examples."""
    (run / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recommit(run)


def large_record(run: Path, like: Path, clients: int = 64, rounds: int = 50) -> Path:
    """The record of a run with many clients: settings like another run's, numbers drawn."""
    draw = random.Random(0)
    names = [f"client-{number:02d}" for number in range(clients)]
    facts = json.loads((like / "run.json").read_text())
    counts = next(iter(facts["clients"].values()))
    facts["clients"] = dict.fromkeys(names, counts)
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(facts))
    (run / "settings.toml").write_text((like / "settings.toml").read_text())
    recommit(run, rounds_done=rounds, tested=True)
    lines: list[dict[str, Any]] = []
    for at in range(rounds):
        for column in ("own", "local"):
            for name in names:
                loss = 3 / (1 + at) + draw.random()
                where = {"round": at, "client": name, "column": column}
                lines.append(
                    {"kind": "train", **where, "metrics": {"loss": loss, "steps": 3, "tokens": 99}}
                    | {"upload_bytes": 600_000, "download_bytes": 900_000, "seconds": draw.random()}
                )
                lines.append(
                    {"kind": "score", "split": "validation", **where, "metrics": {"loss": loss}}
                )
        for name in names:
            weights = {site: draw.random() * 0.5 + 0.25 for site in SITES}
            lines.append(mixer_line(name, at, weights))
        lines.append(
            {"kind": "round", "round": at, "cohort": clients, "seconds": 60 + draw.random()}
            | {"peak_memory_bytes": 600_000_000}
        )
    for name in names:
        for column in ("own", "shared", "local"):
            metrics = {"loss": draw.random(), "accuracy": draw.random(), "rougeL": 50.0}
            where = {"round": rounds - 1, "client": name, "column": column}
            lines.append({"kind": "score", "split": "test", **where, "metrics": metrics})
    append_lines(run, lines)
    write_examples(run, [example_line(name, n) for name in names for n in range(6)])
    return run
