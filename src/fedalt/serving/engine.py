"""Continuous batching: requests of all clients join the running passes and leave between tokens."""

import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fedalt.adapters.lowrank import Combination
from fedalt.adapters.shelf import SUM
from fedalt.core.seeds import generator
from fedalt.evaluation.asking import ends
from fedalt.evaluation.group import Ids
from fedalt.models.base import Base
from fedalt.serving.batch import Adapters, Alone, Batch, Together, can_share
from fedalt.serving.cache import longest_in, tokens_held
from fedalt.serving.memory import room_of

_READ: Final = 512  # prompt tokens between two steps: those who are being answered wait that long
_GREEDY: Final = 1e-6  # a temperature below is none: divided by it, logits may become infinite
# "stop": an end token; "length": all tokens or the time are used up; the others came to nothing.
End = Literal["stop", "length", "late", "failed"]


class QueueFullError(Exception):
    """As many requests wait as may."""


class ClosedError(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Request:
    """A prompt, how it is to be gone on with, and who is told.

    `tell` gets every token as it is written, None where there is none, and at the last one why it
    ends; it is called in the engine's thread. A `temperature` below _GREEDY is greedy. Whoever
    waits no longer sets `gone`. `deadline`: of `time.monotonic`.
    """

    adapters: Adapters
    prompt: Ids
    max_tokens: int
    tell: Callable[[int | None, End | None], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    deadline: float = float("inf")
    gone: bool = False
    written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        seed = secrets.randbits(32) if self.seed is None else self.seed
        self._stream = generator(seed, "answer")

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer may have."""
        return len(self.prompt) + self.max_tokens

    def choose(self, logits: Tensor) -> int:
        """The next token, of logits (vocabulary,)."""
        likeliest = int(logits.argmax())
        if self.temperature < _GREEDY:
            return likeliest
        chances = (logits.float().cpu() / self.temperature).softmax(-1)
        if not chances.isfinite().all():  # nothing can be drawn; the others' answers go on
            return likeliest
        if self.top_p < 1:
            ordered, order = chances.sort(descending=True)
            # Of the likeliest tokens as many as make up top_p, the first always.
            spare = ordered.cumsum(0) - ordered >= self.top_p
            spare[0] = False
            ordered[spare] = 0
            chances = torch.zeros_like(chances).scatter(0, order, ordered)
        return int(chances.multinomial(1, generator=self._stream))


@dataclass(eq=False)
class _Running:
    """A batch and whose its rows are."""

    batch: Batch
    requests: list[Request] = field(default_factory=list)


class Engine:
    """Answers requests in a thread of its own, at most `rows` at once; `queue` more may wait.

    A request also waits while memory does not hold it beside those that are being answered.
    `on_failure` is called in that thread where it ends by an error.
    """

    def __init__(self, base: Base, *, rows: int, queue: int) -> None:
        self.base = base
        self.counts: Counter[str] = Counter()
        self.on_failure: Callable[[], object] = lambda: None
        self._rows, self._queue = rows, queue
        self._shares = can_share(base)
        self._room = room_of(base) if self._shares else sys.maxsize  # alone, nothing is kept
        self._ends = frozenset(ends(base))
        self._waiting: deque[Request] = deque()
        self._acts: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._batches: dict[Combination | None, _Running] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer that memory holds."""
        return longest_in(self._room)

    @property
    def waiting(self) -> int:
        """Requests that have not begun and that somebody waits for."""
        with self._changed:
            return sum(not request.gone for request in self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return sum(len(each.requests) for each in [*self._batches.values()])

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, finish those that are there, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self.alive:
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Have a request answered. Raises QueueFullError and ClosedError."""
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._waiting) >= self._queue:  # who has hung up keeps no place
                self._waiting = deque(each for each in self._waiting if not each.gone)
            if len(self._waiting) >= self._queue:
                raise QueueFullError
            self._waiting.append(request)
            self._changed.notify()

    def between_steps(self, act: Callable[[], Any]) -> Any:
        """What `act` returns, carried out while no pass is under way."""
        with self._changed:
            if self.alive:
                future: Future[Any] = Future()
                self._acts.append((act, future))
                self._changed.notify()
            else:
                return act()
        return future.result()

    def _run(self) -> None:
        try:
            while self._wait():
                while self._acts:
                    act, future = self._acts.popleft()
                    _carry_out(act, future)
                with torch.no_grad():
                    self._admit()
                    for running in self._batches.values():
                        self._step(running)
        finally:
            self._give_up()

    def _wait(self) -> bool:
        """Until there is something to do; False when nothing will be any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._acts or self.running or self._closed
            )
            return bool(self._waiting or self._acts or self.running)

    def _admit(self) -> None:
        read = 0
        while self.running < self._rows and read < _READ:
            if (request := self._next()) is None:
                return
            if time.monotonic() > request.deadline:
                request.tell(None, "late")
                continue
            running = self._home(request.adapters)
            if self.running and not self._fits(request, running):
                with self._changed:
                    self._waiting.appendleft(request)
                return
            # It counts before it is read: should that fail, it is told.
            running.requests.append(request)
            logits = running.batch.join(request.adapters, request.prompt)
            read += len(request.prompt)
            self.counts["prompt_tokens"] += len(request.prompt)
            self._advance(running, len(running.requests) - 1, logits[0])

    def _fits(self, request: Request, home: _Running) -> bool:
        """Whether memory holds it in that batch once it and all others are as long as they get."""
        held = 0
        for running in self._batches.values():
            texts = [*running.requests, request] if running is home else running.requests
            longest = max((text.longest for text in texts), default=0)
            # Who has left may have been the longest: buffers shrink with the next that is new.
            held += max(running.batch.held, tokens_held(len(texts), longest))
        return held <= self._room

    def _next(self) -> Request | None:
        """The first that waits, taken out; None where nobody does."""
        with self._changed:
            while self._waiting:
                request = self._waiting.popleft()
                if not request.gone:
                    return request
        return None

    def _home(self, adapters: Adapters) -> _Running:
        """The batch that a request joins; the base model goes with any."""
        kind = None
        if self._shares:
            kind = next(iter(self._batches), SUM)
            kind = kind if adapters.factors is None else adapters.factors.kind
        if kind not in self._batches:
            batch = Alone(self.base) if kind is None else Together(self.base, kind)
            self._batches[kind] = _Running(batch)
        return self._batches[kind]

    def _step(self, running: _Running) -> None:
        """Drop whom nobody waits for, then one token for each of the others."""
        for row in reversed(range(len(running.requests))):
            if running.requests[row].gone:
                self._leave(running, row)
        if not running.requests:
            return
        logits = running.batch.step([request.written[-1] for request in running.requests])
        self.counts["passes"] += 1
        self.counts["rows"] += len(running.requests)
        for row in reversed(range(len(running.requests))):  # the last one may take another's place
            self._advance(running, row, logits[row])

    def _advance(self, running: _Running, row: int, logits: Tensor) -> None:
        request = running.requests[row]
        token = request.choose(logits)
        request.written.append(token)
        self.counts["written_tokens"] += 1
        end: End | None = None
        if token in self._ends:
            end = "stop"
        elif len(request.written) >= request.max_tokens or time.monotonic() > request.deadline:
            end = "length"
        if end is not None:
            self._leave(running, row)
        request.tell(token, end)

    @staticmethod
    def _leave(running: _Running, row: int) -> None:
        running.batch.leave(row)
        last = running.requests.pop()
        if row < len(running.requests):
            running.requests[row] = last

    def _give_up(self) -> None:
        """Tell whoever still waits, which is nobody unless something has failed."""
        with self._changed:
            self._closed, left = True, [*self._waiting]
            left += [request for each in self._batches.values() for request in each.requests]
            acts = [*self._acts]
        for _, future in acts:
            future.set_exception(ClosedError())
        for request in left:
            request.tell(None, "failed")
        if left:
            self.on_failure()


def _carry_out(act: Callable[[], Any], future: "Future[Any]") -> None:
    """Whoever asked for it gets its error, too."""
    try:
        future.set_result(act())
    except Exception as error:
        future.set_exception(error)
