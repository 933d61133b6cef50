"""One run in several processes of this machine: started, spoken to and ended by the first.

They speak through torch.distributed with its gloo backend, on the loopback interface. Messages are
the codec's bytes, each behind its length. Only the first process writes the record and the server's
state; the others read the folder and write the states of the clients that they train.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Final, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fedalt.engine.course import Event
from fedalt.engine.crew import Alone, Crew, Job, Score, Scored, Train
from fedalt.engine.in_process import Reply
from fedalt.gloo import Place, computing, connected, meeting, post, receive, wait
from fedalt.training.group import TrainingError

T = TypeVar("T")
Work = Callable[[Job], Callable[[Sequence[str]], Sequence[Reply | Scored]]]
Hear = Callable[[Event], None]

_LOOK: Final = 0.2  # seconds between two looks at them
_LAST_WORDS: Final = 10  # seconds that a process may take to end after its connections have
_AHEAD: Final = 2  # groups that a process has been given: the one it works on, and the next


class ProcessError(ValueError):
    """Processes that cannot be had, or one that failed or ended before its work was done."""


@dataclass(frozen=True)
class _Call:
    """A group of clients, and what to do for them."""

    job: Train | Score
    group: tuple[str, ...]


@dataclass(frozen=True)
class _Answer:
    """What came of a group, and the signs of life on the way."""

    done: tuple[Reply | Scored, ...]
    heard: tuple[Event, ...]


@contextmanager
def crew(
    path: Path, processes: int, device: torch.device, lock: int, hear: Hear, *, wait: bool
) -> Iterator[Crew]:
    """So many processes for the run in a folder, this one among them; they end with the block.

    `lock` is the descriptor that holds the folder's lock: it is held until the last one has ended.
    Without `wait` this process works alone until the others have started.
    Raises ProcessError for one that fails, TrainingError for training that does.
    """
    if processes == 1:
        yield Alone()
        return
    if dist.is_initialized():
        raise ProcessError(
            f"[training] processes={processes}: torch.distributed is in use in this process"
        )
    with ExitStack() as open_:
        store = meeting()
        threads = max(1, torch.get_num_threads() // processes)
        place = Place(0, processes, store.port, device.type == "cuda", threads)
        open_.enter_context(computing(place))
        others = open_.enter_context(_started(path, place, lock))
        leader = _Leader(place, store, others, hear, open_)
        while wait and not leader.joined():
            time.sleep(_LOOK / 4)
        yield leader


def serve(place: Place, load: Callable[[Hear], Work]) -> NoReturn:
    """What every process but the first does: `load` the run, and work until the first one ends it.

    The reason of a failure goes to the first process.
    """
    store = meeting(place.port)
    heard: list[Event] = []
    try:
        with computing(place):
            work = load(heard.append)
            store.set(_ready(place.process), "")
            with connected(place, store, lambda act: act()):
                _work(work, heard)
    except Exception as error:
        store.set(_failed(place.process), json.dumps(_told(error)))
        raise SystemExit(1) from error


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however that happened.

    Its standard input is a pipe whose other end only that process holds.
    """

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written; the stream object could not be left in the middle
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@dataclass
class _Leader:
    """The first process as it speaks to the others; their connections end with `open_`."""

    place: Place
    store: TCPStore
    others: Mapping[int, subprocess.Popen[bytes]]
    hear: Hear
    open_: ExitStack
    _joined: bool = False

    def share(
        self,
        job: Job,
        groups: Iterable[Sequence[str]],
        do: Callable[[Sequence[str]], Sequence[T]],
    ) -> Iterator[Sequence[T]]:
        """Groups go round robin, the first to this process; see `Crew`."""
        left = iter(groups)
        while not self.joined():
            if (group := next(left, None)) is None:
                return
            yield do(group)
        of = self.place.of
        coming = enumerate(left)
        given: deque[tuple[int, Sequence[str], list[dist.Work]]] = deque()

        def give() -> None:
            while len(given) < of * _AHEAD and (one := next(coming, None)):
                at, group = one
                sent = post(_Call(job, tuple(group)), at % of) if at % of else []
                given.append((at % of, group, sent))

        give()
        while given:
            process, group, sent = given.popleft()
            if process:
                answer = self.attend(partial(receive, _Answer, process))
                wait(sent)
                for event in answer.heard:
                    self.hear(event)
                done = cast(Sequence[T], answer.done)  # the job says which it is
            else:
                done = do(group)
            give()
            yield done

    def joined(self) -> bool:
        """Whether the others take part: from the moment on when all of them have loaded the run."""
        if not self._joined:
            self._require_alive()
            if self.store.check([_ready(each) for each in self.others]):
                self.open_.enter_context(connected(self.place, self.store, self.attend))
                self._joined = True
        return self._joined

    def attend(self, act: Callable[[], T]) -> T:
        """Something that depends on the others, given up as soon as one of them has failed.

        Whoever presses Ctrl-C is heard, too: torch does not listen while it waits.
        """
        found: list[T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                found.append(act())
            except Exception as error:  # told below, by the thread that asked
                errors.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK)
            self._require_alive()
        if errors:
            until = time.monotonic() + _LAST_WORDS
            while time.monotonic() < until:  # a connection ends a moment before its process
                self._require_alive()
                time.sleep(_LOOK / 4)
            raise errors[0]
        return found[0]

    def _require_alive(self) -> None:
        """Raise what has ended one of the others, if something has."""
        for process, other in self.others.items():
            code = other.poll()
            if code is None:
                continue
            who = f"process {process + 1}/{len(self.others) + 1}"
            if self.store.check([_failed(process)]):
                raise _error_of(who, json.loads(self.store.get(_failed(process))))
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
            raise ProcessError(
                f"{who} (pid {other.pid}) {how} before its work was done; with processes = 1 in "
                "[training] a run does without others"
            )


def _work(work: Work, heard: list[Event]) -> NoReturn:
    """Do what the first process asks for; an answer is on its way while the next group is done."""
    sent: list[dist.Work] = []
    now: tuple[Job, Callable[[Sequence[str]], Sequence[Reply | Scored]]] | None = None
    while True:
        call = receive(_Call, 0)
        if now is None or now[0] != call.job:
            now = call.job, work(call.job)
        heard.clear()
        done = now[1](call.group)
        wait(sent)
        sent = post(_Answer(tuple(done), tuple(heard)), 0)


@contextmanager
def _started(path: Path, first: Place, lock: int) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """The other processes, which end with this block at the latest."""
    others: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for process in range(1, first.of):
            place = json.dumps({**asdict(first), "process": process})
            # Without -P the current folder would come before all installed packages.
            others[process] = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", "fedalt.cli.process", str(path), place],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(lock,),
            )
        yield others
    finally:
        for other in others.values():
            other.kill()
        for other in others.values():
            other.wait()
            if other.stdin is not None:
                other.stdin.close()


def _ready(process: int) -> str:
    return f"ready/{process}"


def _failed(process: int) -> str:
    return f"failed/{process}"


def _told(error: Exception) -> dict[str, str]:
    """An error as the first process is told of it."""
    match error:
        case TrainingError():
            kind = "training"
        case ValueError() | OSError():
            kind = "mistake"
        case _:
            kind = "fault"
    text = str(error) if kind != "fault" else f"{type(error).__name__}: {error}"
    return {"kind": kind, "text": text, "traceback": "".join(traceback.format_exception(error))}


def _error_of(who: str, told: Mapping[str, str]) -> Exception:
    """The error that ends a run because of one in another process."""
    kinds = {"training": TrainingError, "mistake": ProcessError, "fault": RuntimeError}
    error: Exception = kinds[told["kind"]](f"{who}: {told['text']}")
    error.add_note(told["traceback"])
    return error
