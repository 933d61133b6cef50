"""Over how many processes of a CPU a run is spread that does not say so itself."""

import os
import sys
from typing import Final

import torch
import torch.distributed as dist

from fedalt.prepare import Prepared, learner_of

# Threads of one process wait for each other after every small product, and for whatever else the
# machine does in between; processes with one thread do not. See docs/benchmarks.md.
_MOST: Final = 8  # more have not been tried
_WORTH: Final = 60.0  # seconds of work; with half as many as that nothing was gained
_RATE: Final = 5e10  # operations of one thread in a second, roughly
_PROCESS: Final = 2**30  # bytes of a process beside its base model


def processes_for(prepared: Prepared) -> int:
    """How many processes share a run: as the settings say, or else as many as pay.

    What pays depends on the settings, the data, the base model, and the machine's cores and memory,
    not on a stopwatch nor on how far the run is: threads decide the last bits of its numbers.
    """
    settings, base = prepared.parts.settings, prepared.parts.base
    if settings.training.processes is not None:
        return settings.training.processes
    here = sys.platform == "linux" and dist.is_available() and not dist.is_initialized()
    if not here or base.adapted.device.type != "cpu" or settings.model.quantise:
        return 1
    clients, share = prepared.task.clients, settings.rounds.participation
    sizes = [prepared.task.training_size(each) for each in clients]
    epochs = settings.training.local_epochs * settings.rounds.rounds * len(prepared.parts.arms)
    tokens = epochs * share * sum(examples * mean for examples, mean in sizes)
    model = base.adapted.model
    return suited(
        threads=torch.get_num_threads(),
        passes=round(share * sum(1 for _ in learner_of(prepared).groups(clients))),
        operations=4 * model.num_parameters() * tokens,
        model_bytes=model.get_memory_footprint(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def suited(
    *, threads: int, passes: int, operations: float, model_bytes: float, memory: float
) -> int:
    """As many as there are threads, passes of a round to share, and room in half of the memory."""
    if operations < _WORTH * _RATE * min(threads, _MOST):
        return 1
    room = int(memory / 2 / (model_bytes + _PROCESS))
    return max(1, min(threads, passes, room, _MOST))
