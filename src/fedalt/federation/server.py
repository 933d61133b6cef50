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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

from fedalt.core.codec import encode
from fedalt.engine.blame import take_in_usable
from fedalt.engine.round import server_of
from fedalt.engine.run import round_line
from fedalt.engine.schedule import Arm, Progress
from fedalt.engine.screening import Gate
from fedalt.federation.agreement import Terms
from fedalt.federation.messages import NEVER, Call
from fedalt.federation.record_lines import is_validated, last_counted, score_lines, train_lines
from fedalt.federation.round_collector import Called, Desk, Rules, Say
from fedalt.federation.round_uploads import RoundUploads
from fedalt.federation.transport import Channel
from fedalt.methods.contract import AnyMethod
from fedalt.methods.local import LocalOnly
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import RunFolder, StoreError, create, open_run, require_settings
from fedalt.runs.settings import lora_of, method_name, to_toml
from fedalt.runs.setup import trainable

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
        progress = self.folder.progress().sound()
        self.folder.require_whole()
        self._sweep(progress)
        called: Called = {}
        for round_ in range(progress.rounds_done, schedule.rounds):
            progress = self._round(progress, round_, called)
        if not is_validated(self.folder.lines(), schedule.rounds - 1):
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
        verdicts = self._take_in(desk)
        self._record(desk, verdicts)
        self.folder.record(round_line(round_, len(cohort), began))
        refused = [each for each, reason in verdicts.items() if reason is not None]
        progress = self._with_best(progress, desk, score, refused)
        progress = replace(progress, rounds_done=round_ + 1)
        self.folder.commit(progress)
        self._sweep(progress)
        return progress

    def _score(self, progress: Progress, called: Called) -> Progress:
        """Score the last round on validation data."""
        round_ = self.terms.settings.rounds.rounds
        call = self._calling(progress, round_, dict.fromkeys(self._columns(), round_ - 1))
        desk = self._desk(round_, called)
        desk.gather({each: call(each) for each in self._clients()})
        self._record(desk, {})
        progress = self._with_best(progress, desk, dict.fromkeys(self._columns(), round_ - 1))
        self.folder.commit(progress)
        return progress

    def _test(self, progress: Progress, called: Called) -> Progress:
        """Score the chosen rounds on test data."""
        select = self.terms.settings.rounds.select
        chosen = {column: progress.chosen(column, select) for column in self._columns()}
        call = self._calling(progress, progress.rounds_done + 1, chosen, split="test")
        desk = self._desk(progress.rounds_done + 1, called)
        desk.gather({each: call(each) for each in self._clients()})
        self._record(desk, {})
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
        accepted = last_counted(self.folder.lines())
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

    def _take_in(self, desk: Desk) -> dict[str, str | None]:
        """Aggregate a round's uploads; of each client why its answer is refused, None if it counts.

        Nothing is recorded yet: what has come of an upload may depend on all others.
        """
        states = self._states(desk.round)
        server = server_of(self._method, self.terms.start, states)
        uploads = RoundUploads(desk, {})
        after = take_in_usable(self._method, server, uploads, self.gate, states)
        if after is None:
            self.say(f"round {desk.round}: no upload counts; the server's state stays as it was")
        else:
            states.put("server", after)
        return uploads.verdicts

    def _record(self, desk: Desk, verdicts: Mapping[str, str | None]) -> None:
        """Record scores and training of a round; of a refused answer, the training with why."""
        counted = [each for each in sorted(desk.answers) if verdicts.get(each) is None]
        lines = [line for each in counted for line in score_lines(desk, each)]
        for client_id, reason in verdicts.items():
            if reason is not None:
                self.say(f"round {desk.round}: {client_id}: refused: {reason}")
            lines += train_lines(desk, client_id, reason)
        for line in lines:
            self.folder.record(line)

    def _with_best(
        self,
        progress: Progress,
        desk: Desk,
        asked: Mapping[str, int],
        refused: Collection[str] = (),
    ) -> Progress:
        """The best rounds once the scores that a round has asked for are known.

        Late and refused answers are none; and unless more than half of the clients have answered,
        the few do not choose for all.
        """
        answers = [
            answer
            for client_id, answer in desk.answers.items()
            if answer.call and answer.round == desk.round and client_id not in refused
        ]
        if 2 * len(answers) <= len(self._clients()):
            return progress
        for column, round_ in asked.items():
            losses = [
                score.metrics["loss"]
                for answer in answers
                for score in answer.scores
                if (score.split, score.column, score.round) == ("validation", column, round_)
            ]
            progress = replace(progress, best=progress.best_with(column, round_, losses))
        return progress

    def _sweep(self, progress: Progress) -> None:
        """Drop answers of rounds that are over."""
        for old in (self.folder.path / "incoming").glob("[0-9]*"):
            if old.name.isdecimal() and int(old.name) < progress.rounds_done and old.is_dir():
                shutil.rmtree(old)

    def _desk(self, round_: int, called: Called) -> Desk:
        return Desk(
            self.terms,
            self._columns(),
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


def open_host(
    terms: Terms, folder: Path, channel: Channel, rules: Rules, gate: Gate, say: Say
) -> Host:
    """The server in its folder, which is made if it is not there. Raises StoreError."""
    method = terms.settings.method
    arms = [Arm("own", method)]
    if terms.settings.local_baseline and method_name(method) != "local":
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
