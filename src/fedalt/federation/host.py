"""The server of a federation: calls clients, checks what comes back, aggregates, never forgets.

Its folder is a run's folder without clients' states, and beside that

    incoming/0007/ID.bin   answers of the round in progress, as they came
    refused.jsonl          uploads that were not counted, and why
    status.json            who is there, who was heard when

An answer is on disk before it counts, a round counts once progress.json is replaced: the process
may be killed at any time and goes on where it was.
"""

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Final, Literal

from fedalt.codec import encode
from fedalt.engine.course import Arm, Progress
from fedalt.engine.gate import Arrival, Gate, take_in
from fedalt.engine.in_process import server_of
from fedalt.engine.schedule import round_line
from fedalt.federation.channel import Channel
from fedalt.federation.desk import Called, Desk, Rules, Say
from fedalt.federation.messages import NEVER, Call, Score
from fedalt.federation.terms import Terms
from fedalt.methods.contract import AnyMethod
from fedalt.methods.local import LocalOnly
from fedalt.prepare import trainable
from fedalt.settings import lora_of, method_name, to_toml
from fedalt.states import FileStates
from fedalt.store import RunFolder, StoreError, create, open_run, require_settings

_FAREWELL: Final = 30.0  # seconds to hear from everyone that they know it has ended


@dataclass(frozen=True)
class Host:
    """A server with its folder and its connection. Use it within `locked(folder.path)`."""

    terms: Terms
    arms: tuple[Arm, ...]
    folder: RunFolder
    channel: Channel
    rules: Rules
    gate: Gate
    say: Say

    def to_the_end(self) -> None:
        """Go on from where the folder stands until the test data are scored and all know it."""
        schedule = self.terms.settings.rounds
        progress = self.folder.progress()
        self.folder.require_whole()
        self._sweep(progress)
        called: Called = {}
        for round_ in range(progress.rounds_done, schedule.rounds):
            progress = self._round(progress, round_, called)
        if not self._validated(schedule.rounds - 1):
            progress = self._score(progress, called)
        if schedule.test and not progress.tested:
            progress = self._test(progress, called)
        self._farewell(progress, called)

    def _round(self, progress: Progress, round_: int, called: Called) -> Progress:
        began = time.monotonic()
        schedule = self.terms.settings.rounds
        cohort = schedule.cohort(self._clients(), round_, self.terms.settings.seed)
        scored = round_ > 0 and round_ % schedule.evaluate_every == 0
        score = dict.fromkeys(self._columns(), round_ - 1) if scored else {}
        clients = self._clients() if scored else cohort
        call = self._calling(progress, round_, score)
        calls = {each: call(each, train=each in cohort) for each in clients}
        self.say(f"round {round_}: {len(cohort)} of {len(self._clients())} clients train")
        desk = self._desk(round_, called)
        desk.gather(calls, cohort)
        best = self._scores(desk, dict(progress.best))
        states = self._states(round_)
        server = server_of(self._method, self.terms.start, states)
        after = take_in(self._method, server, self._arrivals(desk), self.gate, states)
        if after is None:
            self.say(f"round {round_}: no upload counts; the server's state stays as it was")
        else:
            states.put("server", after)
        self.folder.record(round_line(round_, len(cohort), began))
        progress = Progress(round_ + 1, best)
        self.folder.commit(progress)
        self._sweep(progress)
        return progress

    def _score(self, progress: Progress, called: Called) -> Progress:
        """Score the last round on validation data."""
        round_ = self.terms.settings.rounds.rounds
        call = self._calling(progress, round_, dict.fromkeys(self._columns(), round_ - 1))
        desk = self._desk(round_, called)
        desk.gather({each: call(each) for each in self._clients()})
        progress = replace(progress, best=self._scores(desk, dict(progress.best)))
        self.folder.commit(progress)
        return progress

    def _test(self, progress: Progress, called: Called) -> Progress:
        """Score the chosen rounds on test data."""
        select = self.terms.settings.rounds.select
        chosen = {column: progress.chosen(column, select) for column in self._columns()}
        call = self._calling(progress, progress.rounds_done + 1, chosen, split="test")
        desk = self._desk(progress.rounds_done + 1, called)
        desk.gather({each: call(each) for each in self._clients()})
        self._scores(desk, {})
        progress = replace(progress, tested=True)
        self.folder.commit(progress)
        return progress

    def _farewell(self, progress: Progress, called: Called) -> None:
        """Tell everyone who is there that nothing comes any more; nobody is waited for long."""
        call = self._calling(progress, progress.rounds_done + 2, {})
        self.say("the federation has ended")
        online = self.channel.online()
        waiting = {
            each: 1 + len(called.get(each, ())) for each in self._clients() if each in online
        }
        self.channel.send((each, encode(call(each, last=True))) for each in waiting)
        end = time.monotonic() + _FAREWELL
        while any(waiting.values()) and time.monotonic() < end:
            for each, _ in self.channel.receive():  # who goes away without an answer has heard it
                waiting[each] = waiting.get(each, 1) - 1
        if deaf := sorted(each for each in self._clients() if waiting.get(each, 1) > 0):
            self.say(
                f"not told that it has ended: {', '.join(deaf)}; the server, started again, tells "
                "them"
            )
        self._sweep(replace(progress, rounds_done=progress.rounds_done + 3))

    def _calling(
        self,
        progress: Progress,
        round_: int,
        score: Mapping[str, int],
        split: Literal["validation", "test"] = "validation",
    ) -> Callable[..., Call]:
        """Makes calls of one kind."""
        at = score.get("own", round_ - 1) if split == "test" else progress.rounds_done - 1
        server = server_of(self._method, self.terms.start, self._states(at + 1))
        accepted = self._accepted()
        keep = {column: best[0] for column, best in progress.best.items()}

        def call(client_id: str, *, train: bool = False, last: bool = False) -> Call:
            return Call(
                federation=self.terms.name,
                terms=self.terms.digest,
                client=client_id,
                round=round_,
                accepted=accepted.get(client_id, NEVER),
                train=train,
                message=self._method.broadcast(server, client_id),
                score=dict(score),
                split=split,
                keep=keep,
                last=last,
            )

        return call

    def _arrivals(self, desk: Desk) -> Iterator[Arrival]:
        """The round's uploads, one at a time in memory, sorted by client."""

        def decide(client_id: str, reason: str | None) -> None:
            if reason is not None:
                self.say(f"round {desk.round}: {client_id}: refused: {reason}")
            self._record_training(desk, client_id, reason)

        for client_id in sorted(desk.uploads):
            data, upload = desk.upload(client_id)
            yield Arrival(client_id, upload, data, None, partial(decide, client_id))

    def _scores(
        self, desk: Desk, best: dict[str, tuple[int, float]]
    ) -> dict[str, tuple[int, float]]:
        """Record the scores of a round's answers; the best rounds with these among them."""
        losses: dict[tuple[str, int], list[float]] = {}
        for client_id, answer in sorted(desk.answers.items()):
            for score in answer.scores:
                self.folder.record(_line(client_id, score))
                if score.split == "validation":
                    losses.setdefault((score.column, score.round), []).append(score.metrics["loss"])
        for (column, round_), found in losses.items():
            if fmean(found) < best.get(column, (0, float("inf")))[1]:
                best[column] = (round_, fmean(found))
        return best

    def _record_training(self, desk: Desk, client_id: str, refused: str | None) -> None:
        answer = desk.answers[client_id]
        for cost in answer.costs:
            own = cost.column == "own"
            line = {
                "kind": "train",
                "round": desk.round,
                "trained": answer.round,
                "client": client_id,
                "column": cost.column,
                "metrics": dict(cost.metrics),
                "upload_bytes": desk.uploads[client_id] if own else 0,
                "download_bytes": desk.downloads.get(client_id, 0) if own else 0,
                "seconds": cost.seconds,
            }
            self.folder.record(line if refused is None else {**line, "refused": refused})

    def _accepted(self) -> dict[str, int]:
        """The last round of each client whose upload counts, as the record tells."""
        return {
            line["client"]: line["trained"]
            for line in self.folder.lines()
            if line["kind"] == "train" and line["column"] == "own" and "refused" not in line
        }

    def _validated(self, round_: int) -> bool:
        return any(
            line["kind"] == "score" and line["split"] == "validation" and line["round"] == round_
            for line in self.folder.lines()
        )

    def _sweep(self, progress: Progress) -> None:
        """Drop answers of rounds that are over."""
        for old in (self.folder.path / "incoming").glob("[0-9]*"):
            if old.name.isdecimal() and int(old.name) < progress.rounds_done and old.is_dir():
                shutil.rmtree(old)

    def _desk(self, round_: int, called: Called) -> Desk:
        return Desk(
            self.terms,
            self.folder.path,
            self.channel,
            self.rules,
            self.gate,
            self.say,
            round_,
            called,
        )

    def _states(self, round_: int) -> FileStates:
        return self.folder.states("own", round_)

    def _clients(self) -> list[str]:
        left = self.folder.left()
        return [each for each in self.terms.clients if each not in left]

    def _columns(self) -> list[str]:
        return [arm.column for arm in self.arms]

    @property
    def _method(self) -> AnyMethod:
        return self.arms[0].method


def _line(client_id: str, score: Score) -> dict[str, object]:
    return {
        "kind": "score",
        "split": score.split,
        "round": score.round,
        "client": client_id,
        "column": score.column,
        "metrics": dict(score.metrics),
    }


def open_host(
    terms: Terms, folder: Path, channel: Channel, rules: Rules, gate: Gate, say: Say
) -> Host:
    """The server in its folder, which is made if it is not there. Raises StoreError."""
    method = terms.settings.method
    arms = [Arm("own", method)]
    if terms.settings.yardstick and method_name(method) != "local":
        arms.append(Arm("local", LocalOnly(lora=lora_of(method))))
    if not (folder / "run.json").exists():
        create(folder, to_toml(terms.settings), _facts(terms, arms))
    host = Host(terms, tuple(arms), open_run(folder), channel, rules, gate, say)
    if (found := host.folder.facts().get("terms")) != terms.digest:
        raise StoreError(
            f"{folder} belongs to other terms than terms.toml (and its template.txt, if it has "
            f"one): its run.json says {found!r}, but they are {terms.digest!r}"
        )
    require_settings(folder, to_toml(terms.settings))
    return host


def _facts(terms: Terms, arms: Sequence[Arm]) -> dict[str, object]:
    """What run.json holds; the data are with the clients."""
    packages = {name: version(name) for name in ("fedalt", "torch")}
    return {
        "terms": terms.digest,
        "versions": {"python": platform.python_version(), **packages},
        "data": {
            "fingerprint": "with the clients",
            "kind": "classify" if terms.labels else "generate",
            "labels": list(terms.labels),
            "template": "",
        },
        "model": {"name": terms.settings.model.name, "fingerprint": terms.model},
        "method": method_name(terms.settings.method),
        "trainable_numbers": {arm.column: trainable(arm, terms.start) for arm in arms},
        "clients": {client_id: {} for client_id in terms.clients},
        "warnings": [],
    }
