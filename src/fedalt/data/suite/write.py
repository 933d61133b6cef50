"""The suite as a folder of client data."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fedalt.data.suite.tasks import TASKS, SuiteRecord, generate_clients


def write_suite(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 96,
    validation: int = 40,
    test: int = 160,
    clients_per_task: int = 1,
) -> None:
    """Write NAME.train.jsonl, NAME.validation.jsonl and NAME.test.jsonl of every client.

    A client is named after its task, TASK-0, TASK-1 and so on where a task has several. A folder
    that is not there yet appears complete or not at all; in one that is there each file is
    replaced whole.
    """
    files = {
        f"{task}{f'-{client}' if clients_per_task > 1 else ''}.{split}.jsonl": _lines(records)
        for task in TASKS
        for client, splits in enumerate(
            generate_clients(
                task, clients_per_task, seed=seed, train=train, validation=validation, test=test
            )
        )
        for split, records in splits.items()
        if records
    }
    if folder.is_dir():
        others = sorted(path.name for path in folder.glob("*.jsonl") if path.name not in files)
        if others:
            raise ValueError(f"{folder} already holds {others[0]}; expected no other client's data")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        fresh = Path(name) / "suite"
        fresh.mkdir()
        for file, text in files.items():
            (fresh / file).write_text(text, encoding="utf-8")
        if not folder.exists():
            fresh.rename(folder)
        else:
            for file in files:
                (fresh / file).replace(folder / file)


def _lines(records: Iterable[SuiteRecord]) -> str:
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
