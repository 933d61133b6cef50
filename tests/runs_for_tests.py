"""Small real runs: a saved tiny model, a few clients' files, settings over them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bases import letters
from tiny import llama

from fedalt.runs.settings import Settings, settings_of

ANSWERS = {"a": "yes", "b": "no", "c": "maybe", "d": "never", "e": "often", "f": "soon"}


def save_model(folder: Path) -> Path:
    """A tiny random Llama and its tokenizer, as transformers saves them."""
    llama().save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def write_clients(folder: Path, clients: Sequence[str] = ("a", "b", "c"), count: int = 12) -> Path:
    """Clients who answer the same questions, each in its own way."""
    folder.mkdir(parents=True, exist_ok=True)
    for client in clients:
        for split, first in (("train", 0), ("test", 100)):
            records = [
                {"instruction": f"ask {n}{client}", "output": ANSWERS[client]}
                for n in range(first, first + count)
            ]
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{client}.{split}.jsonl").write_text(text)
    return folder


def settings_for(model: Path, data: Path, /, **sections: dict[str, Any]) -> Settings:
    """Settings of a run that takes seconds."""
    table: dict[str, Any] = {
        "data": {"path": str(data), "max_length": 60, "validation": 0.2},
        "model": {"name": str(model), "device": "cpu"},
        "method": {"name": "fedalt", "rank": 2, "alpha": 4},
        "training": {"lr": 1e-2, "batch_size": 4},
        "rounds": {"rounds": 4},
        "scoring": {"max_new_tokens": 4},
    }
    for section, values in sections.items():
        table[section] = {**table.get(section, {}), **values}
    return settings_of(table, "a test")


def adapters_of(run: Path) -> dict[str, str]:
    """A digest of every state file of a run, by path."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*.safetensors"))
    }


def scores_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's record without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "peak_memory_bytes")}
        for line in lines
    ]
