"""The base model's own scores in a comparison: once for all runs that share base, data, scoring."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict

from fedalt.core.digests import digest_of
from fedalt.core.files import atomic_write
from fedalt.core.reading import read_json
from fedalt.engine.schedule import UNTRAINED
from fedalt.runs.compare import Job
from fedalt.runs.folder import locked, open_run
from fedalt.runs.lifecycle import reopen, score_clients
from fedalt.runs.setup import base_arm

Scored = Mapping[str, Mapping[str, float]]  # metrics by client


class _Form(TypedDict):
    scores: dict[str, dict[str, float]]


def base_scores(
    jobs: Sequence[Job], out: Path, say: Callable[[str], None]
) -> dict[tuple[str, ...], Scored]:
    """Test scores of the base model as it is, by the labels of the methods that share it.

    `jobs` are finished runs. What has been scored lies in OUT/base-*.json and is not scored again.
    A classifier whose head begins with random numbers has no scores.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_shared_by(job), []).append(job)
    scores: dict[tuple[str, ...], Scored] = {}
    for key, group in groups.items():
        file = out / f"base-{key[:16]}.json"
        if not file.exists():
            say(f"scoring the base model without any adapter, for {len(group)} runs")
            text = json.dumps({"scores": _score(group[0])}, indent=2, allow_nan=False)
            atomic_write(file, text.encode())
        labels = tuple(dict.fromkeys(job.entry.label for job in group))
        scores[labels] = read_json(file, _Form)["scores"]
    return scores


def base_rows(scores: Mapping[tuple[str, ...], Scored]) -> dict[str, Scored]:
    """The scores by the name of their row."""
    rows = {labels: of for labels, of in scores.items() if of}
    alone = len(scores) == 1
    return {"base" if alone else f"base of {', '.join(of)}": row for of, row in rows.items()}


def _score(job: Job) -> dict[str, Mapping[str, float]]:
    """Metrics by client."""
    prepared = reopen(job.path)
    settings = prepared.parts.settings
    scoring = replace(settings.scoring, base=True)
    parts = replace(prepared.parts, settings=replace(settings, scoring=scoring))
    if (arm := base_arm(parts)) is None:
        return {}
    with locked(job.path):
        prepared, clients = replace(prepared, parts=parts), prepared.task.clients
        lines = score_clients(prepared, open_run(job.path), arm, UNTRAINED, clients)
    return {str(line["client"]): line["metrics"] for line in lines}  # type: ignore[misc]


def _shared_by(job: Job) -> str:
    """The digest of all that the base model's scores depend on."""
    facts, settings = open_run(job.path).facts(), job.settings
    data, model = asdict(settings.data), settings.model
    about = {
        "base": facts["model"]["fingerprint"],
        "quantise": model.quantise,
        "data": facts["data"],
        "form": {key: data[key] for key in ("max_length", "cut_answers")},
        "scoring": asdict(settings.scoring),
    }
    return digest_of(json.dumps(about, sort_keys=True).encode())
