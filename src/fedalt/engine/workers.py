"""Worker processes that share the groups of clients of one run, on this machine.

The first process gives groups out in turn and works itself. What comes back are the codec's bytes.
Only the first process writes the record and the server's state; workers read the folder and write
the states of the clients that they train.
"""

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import ClassVar, Final, TypeVar, cast

import torch

from fedalt.core.codec import decode, encode
from fedalt.engine.client_work import Scored
from fedalt.engine.executor import Do, Executor, Group, InProcess, Job
from fedalt.engine.schedule import Event
from fedalt.engine.uploads import Upload
from fedalt.training.group import TrainingError

T = TypeVar("T")
OnEvent = Callable[[Event], None]
Work = Callable[[Job], Do[Upload | Scored]]
Load = Callable[[Path, OnEvent], Work]

_AHEAD: Final = 2  # groups that a worker has been given: the one it works on, and the next


class WorkerError(ValueError):
    """A worker process that failed, or that ended before its work was done."""


@dataclass(frozen=True)
class _Result:
    """What came of a group and what was heard on the way, or the error that ended it."""

    TAG: ClassVar = "worker-result"

    done: tuple[Upload | Scored, ...] = ()
    heard: tuple[Event, ...] = ()
    kind: str = ""
    error: str = ""
    trace: str = ""


@contextmanager
def workers(
    path: Path, load: Load, count: int, device: torch.device, on_event: OnEvent
) -> Iterator[Executor]:
    """`count` processes for one run: this one and workers, which end with it or with the block.

    `load`, a module's function, opens the run of a folder in a worker. On a CPU the threads are
    shared out evenly, on GPUs each process has its own.
    Raises WorkerError for a worker that fails, TrainingError for training that does.
    """
    if count == 1:
        yield InProcess()
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    places = context.SimpleQueue()
    for place in range(1, count):
        places.put(place)
    reader, writer = context.Pipe(duplex=False)
    arguments = (path, load, places, reader, device.type == "cuda", threads)
    pool = ProcessPoolExecutor(count - 1, context, _begin, arguments)
    before = torch.get_num_threads()
    _take_place(0, cuda=device.type == "cuda", threads=threads)  # this process's share
    try:
        yield _Pool(pool, count, on_event)
    finally:
        writer.close()  # ends the workers, whatever they are doing
        pool.shutdown(cancel_futures=True)
        reader.close()
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Pool:
    """Gives groups out in turn, the first of each turn to this process; see `Executor`."""

    pool: ProcessPoolExecutor
    count: int
    on_event: OnEvent

    def share(self, job: Job, groups: Iterable[Group], do: Do[T]) -> Iterator[Sequence[T]]:
        """What comes of each group, in their order."""
        coming = enumerate(groups)
        given: deque[tuple[Group, Future[bytes] | None]] = deque()
        try:
            while True:
                while len(given) < self.count * _AHEAD and (numbered := next(coming, None)):
                    at, group = numbered
                    ours = at % self.count == 0
                    work = None if ours else self.pool.submit(_work, job, tuple(group))
                    given.append((group, work))
                if not given:
                    return
                group, future = given.popleft()
                yield do(group) if future is None else cast(Sequence[T], self._result(future))
        except BrokenProcessPool:
            raise WorkerError(
                "a worker process has ended before its work was done; most often it was killed "
                "because memory ran out; with processes = 1 in [training] a run does without"
            ) from None

    def _result(self, future: Future[bytes]) -> tuple[Upload | Scored, ...]:
        result = decode(_Result, future.result())
        for event in result.heard:
            self.on_event(event)
        if result.kind:
            kinds = {"training": TrainingError, "mistake": WorkerError, "fault": RuntimeError}
            error: Exception = kinds[result.kind](f"in a worker process: {result.error}")
            error.add_note(result.trace)
            raise error
        return result.done


def _take_place(place: int, *, cuda: bool, threads: int) -> None:
    """Compute on a process's own GPU, or with its share of the CPU's cores."""
    if cuda:
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(threads)


@dataclass
class _Worker:
    """The run of a folder in a worker process, loaded for its first group."""

    path: Path
    load: Load
    heard: list[Event] = field(default_factory=list)
    work: Work | None = None
    current: tuple[Job, Do[Upload | Scored]] | None = None

    def answer(self, job: Job, group: Group) -> _Result:
        """Do a job for one group; an error is told, as not every one can be sent as it is."""
        self.heard.clear()
        try:
            if self.work is None:
                self.work = self.load(self.path, self.heard.append)
            if self.current is None or self.current[0] != job:
                self.current = job, self.work(job)
            return _Result(tuple(self.current[1](group)), tuple(self.heard))
        except Exception as error:
            match error:
                case TrainingError():
                    kind, text = "training", str(error)
                case ValueError() | OSError():
                    kind, text = "mistake", str(error)
                case _:
                    kind, text = "fault", f"{type(error).__name__}: {error}"
            trace = "".join(traceback.format_exception(error))
            return _Result((), tuple(self.heard), kind, text, trace)


_worker: _Worker  # a pool's initialiser has no other place to leave something for its tasks


def _begin(
    path: Path,
    load: Load,
    places: "multiprocessing.SimpleQueue[int]",
    first: Connection,
    cuda: bool,
    threads: int,
) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends us
    Thread(target=_end_with, args=(first,), daemon=True).start()
    _take_place(places.get(), cuda=cuda, threads=threads)
    _worker = _Worker(path, load)


def _end_with(first: Connection) -> None:
    """End this process as soon as the first has closed its end, or has ended in whatever way."""
    first.poll(None)
    os._exit(1)


def _work(job: Job, group: tuple[str, ...]) -> bytes:
    return encode(_worker.answer(job, group))
