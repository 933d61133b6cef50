"""Scores of several clients together against one client after the other.

    python benchmarks/scoring.py --write     # 8 and 64 clients of 8 test examples each

The built-in base model and the built-in suite's tasks in turn, FedALT's plan with rank 8, a tree
for each client. `validation` is the loss and the likelihoods of options, `test` that and written
answers of at most 80 tokens. Variants take turns (A B C A B C ..); what counts are the ratios of
their medians, in seconds of one processor: how many times faster together is, and what it costs to
watch the mixers' weights on 8 examples of each client. `differ by` is the largest difference of a
metric, `texts` the share of written answers that are the same.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from document import table, write

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import Mixer, Plan, Slot
from fedalt.core.tree import merge
from fedalt.data.examples import Example
from fedalt.data.prompts import Template, encode
from fedalt.data.records import Instruction
from fedalt.data.suite import TASKS, generate_clients
from fedalt.evaluation import Scores, Scoring, in_groups, score, score_together
from fedalt.methods.contract import Serving
from fedalt.models.base import Base, load_base

PLAN = Plan((Slot("individual", 8, 32.0), Slot("rest_of_world", 8, 32.0)), Mixer())
WATCHED = 8
Clients = Sequence[tuple[Serving, Sequence[Example]]]


def clients_of(base: Base, count: int, each: int) -> Clients:
    """Test examples of the suite's tasks in turn, and a tree for each client."""
    found = []
    per_task = -(-count // len(TASKS))
    sizes = {"seed": 0, "train": 0, "validation": 0, "test": each}
    for task in TASKS:
        for client in generate_clients(task, per_task, **sizes):
            records = [
                Instruction(
                    str(one["instruction"]), "", str(one["output"]), tuple(one.get("options", ()))
                )
                for one in client["test"]
            ]
            found.append(
                [
                    encode(record, base.tokenizer, Template(), max_length=512).example
                    for record in records
                ]
            )
    init = Initializer(base.adapted.sites, {}, 0)
    servings = []
    for seed in range(count):
        stream = torch.Generator().manual_seed(seed)
        tree = merge(*(init.adapter(slot) for slot in PLAN.slots), init.mixer(2))
        for name in tree:
            if name.factor == "B":
                tree[name] = 0.003 * torch.randn(tree[name].shape, generator=stream)
        servings.append(Serving(PLAN, tree))
    return list(zip(servings, found[:count], strict=True))


def together(base: Base, clients: Clients, scoring: Scoring, watch: int = 0) -> list[Scores]:
    """In groups, as a run does it."""
    found = []
    for group in in_groups(enumerate(examples for _, examples in clients), scoring):
        asked = [(clients[at][0], examples) for at, examples in group]
        found += score_together(base, asked, scoring, watch=watch)
    return found


def compared(alone: Sequence[Scores], others: Sequence[Scores]) -> dict[str, str]:
    """How far two scorings agree."""
    pairs = list(zip(alone, others, strict=True))
    far = max(abs(a.metrics[name] - b.metrics[name]) for a, b in pairs for name in a.metrics)
    texts = [x == y for a, b in pairs for x, y in zip(a.predictions, b.predictions, strict=True)]
    return {"differ by": f"{far:.0e}", "texts": f"{statistics.fmean(texts):.3f}"}


def measure(base: Base, count: int, each: int, turns: int) -> Mapping[str, Any]:
    """One row of the table."""
    clients = clients_of(base, count, each)
    test, validation = Scoring(), Scoring(generate=False)
    variants: dict[str, Callable[[Clients], list[Scores]]] = {
        "validation, alone": lambda of: [score(base, *one, validation) for one in of],
        "validation": lambda of: together(base, of, validation),
        "watched": lambda of: together(base, of, validation, WATCHED),
        "test, alone": lambda of: [score(base, *one, test) for one in of],
        "test": lambda of: together(base, of, test),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    last: dict[str, list[Scores]] = {}
    for run in variants.values():  # to warm up
        run(clients[:4])
    for _ in range(turns):
        for name, run in variants.items():
            began = time.process_time()
            last[name] = run(clients)
            seconds[name].append(time.process_time() - began)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    watched = [replace(each, weighing=None) for each in last["watched"]]
    assert watched == last["validation"]
    return {
        "clients": count,
        "examples each": each,
        "validation, alone / together": f"{median['validation, alone'] / median['validation']:.2f}",
        "test, alone / together": f"{median['test, alone'] / median['test']:.2f}",
        "test, s": f"{median['test']:.1f}",
        "watched / not": f"{median['watched'] / median['validation']:.3f}",
        **compared(last["test, alone"], last["test"]),
    }


def main() -> None:
    """Measure and print a line for every number of clients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--each", nargs="+", type=int, default=[8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base("tiny", device="cpu")
    rows = []
    for count in options.clients:
        for each in options.each:
            rows.append(measure(base, count, each, options.turns))
            print(json.dumps(rows[-1]), flush=True)
    if options.write:
        write("scoring", table(rows))


if __name__ == "__main__":
    main()
