"""Several clients for each of a few tasks, out of files TASK.train.jsonl and TASK.test.jsonl.

    python benchmarks/clients_of_tasks.py SOURCE OUT --tasks sst2 qnli mrpc qqp --clients 4 \
        --train 250 --test 125

writes OUT/TASK-0.train.jsonl and so on. No example goes to two clients; which ones a client gets
depends on the seed alone, and those of a smaller `--train` are part of those of a larger one.
"""

import argparse
import json
from pathlib import Path

import torch

from fedalt.core.seeds import generator


def deal(source: Path, out: Path, task: str, split: str, clients: int, size: int, seed: int) -> int:
    """Write one split of one task; how many records each client got."""
    text = (source / f"{task}.{split}.jsonl").read_text(encoding="utf-8")
    lines = text.removesuffix("\n").split("\n")  # a text may hold other signs that end lines
    order = torch.randperm(len(lines), generator=generator(seed, task, split)).tolist()
    each = min(size, len(lines) // clients)
    for client in range(clients):
        mine = [lines[at] for at in order[client::clients][:each]]
        (out / f"{task}-{client}.{split}.jsonl").write_text(
            "\n".join(mine) + "\n", encoding="utf-8"
        )
    return each


def main() -> None:
    """Read the arguments, write the clients, print what they got."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--clients", type=int, default=4, help="per task")
    parser.add_argument("--train", type=int, default=250, help="examples per client at most")
    parser.add_argument("--test", type=int, default=125, help="examples per client at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    for task in given.tasks:
        got = {
            split: deal(given.source, given.out, task, split, given.clients, size, given.seed)
            for split, size in (("train", given.train), ("test", given.test))
        }
        print(json.dumps({"task": task, "clients": given.clients, **got}))


if __name__ == "__main__":
    main()
