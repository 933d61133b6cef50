"""Folders of a run and of a federation, damaged by a seed, and what became of going on with them.

What has to come of it: the same bits as without the damage, or one error that names a damaged file.
"""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import tomli_w
from damages import KINDS, Target, files_of
from machines import Machines, Wire, found
from runs_for_tests import adapters_of, save_model, scores_of, settings_for, write_clients

from fedalt.core.codec import decode
from fedalt.engine.schedule import Event
from fedalt.federation import client as member
from fedalt.federation import client_folder as opening
from fedalt.federation.messages import Answer
from fedalt.federation.transport import Lost
from fedalt.flower.config import client_from, read_client_config, read_server_config, server_from
from fedalt.report.live import Reading, follow, live_of
from fedalt.report.records import read_record
from fedalt.runs.folder import locked
from fedalt.runs.lifecycle import reopen, resume_run, start_run
from fedalt.runs.setup import Prepared, prepare

CLIENTS: Final = ("a", "b")
ROUNDS: Final = 4
SAME, REFUSED, NOTED = "the same bits", "refused by name", "other settings, told by name"
_SIZES: Final = {
    "training": {"carry_optimizer": True, "batch_size": 4},
    "rounds": {"rounds": ROUNDS},
    "scoring": {"generate": False},
}


@dataclass(frozen=True)
class Outcome:
    """What was done to which files, what came of it, and what was said."""

    kind: str
    files: tuple[str, ...]
    result: str
    said: str = ""

    @property
    def fine(self) -> bool:
        """Whether it is one of the ways in which it may end."""
        return self.result in (SAME, REFUSED, NOTED)


class _StopError(Exception):
    """The moment at which a folder is left behind."""


@dataclass(frozen=True)
class _StopsAt:
    """A watcher who stops a run while a round is going on."""

    round: int

    def on_event(self, event: Event) -> None:
        if (event.what, event.round) == ("train", self.round):
            raise _StopError

    def on_record(self, line: object) -> None:
        """Look away."""


@dataclass
class OfARun:
    """A run that was stopped in its third round, what it was a round before, and how it ends."""

    root: Path
    prepared: Prepared = field(init=False)
    end: object = None

    def __post_init__(self) -> None:
        model = save_model(self.root / "model")
        data = write_clients(self.root / "data", CLIENTS, 6)
        self.prepared = prepare(settings_for(model, data, **_SIZES))
        with contextlib.suppress(_StopError):
            start_run(self.prepared, self.at, _StopsAt(1))
        shutil.copytree(self.at, self.before)
        with contextlib.suppress(_StopError):
            resume_run(self.prepared, self.at, _StopsAt(3))
        self.end = self.go_on(shutil.copytree(self.at, self.root / "straight"))[0]

    @property
    def at(self) -> Path:
        """The folder that copies are damaged of."""
        return self.root / "run"

    @property
    def before(self) -> Path:
        """What it was two rounds before."""
        return self.root / "before"

    def go_on(self, place: Path) -> tuple[object, Sequence[str]]:
        """Look at a copy as every command does, bring it to its end; its bits, what was told."""
        live_of(follow(Reading(place)))
        read_record(place)
        prepared = reopen(place, base=self.prepared.parts.base)
        resume_run(prepared, place)
        read_record(place)
        return (_states_of(place), scores_of(place)), prepared.warnings


class _RefusedError(ValueError):
    """A client's answer that says why it could not."""


@dataclass
class _Strict(Wire):
    """A wire on which a client that could not ends everything."""

    stop: Callable[[int], bool] = lambda _: False

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        """Have one call answered, so that some answers are there when the power goes."""
        calls, self.waiting = self.waiting[:1], self.waiting[1:]
        return [(client_id, self._answer(client_id, data)) for client_id, data in calls]

    def _answer(self, client_id: str, data: bytes) -> bytes:
        found = super()._answer(client_id, data)
        answer = decode(Answer, found)
        if answer.error:
            raise _RefusedError(answer.error)
        if self.stop(answer.round) and client_id == CLIENTS[-1]:
            raise _StopError
        return found


@dataclass
class OfAFederation:
    """A federation whose power went in its third round, and how it ends otherwise."""

    root: Path
    machines: Machines = field(init=False)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    end: object = None

    def __post_init__(self) -> None:
        model = save_model(self.root / "model")
        self.machines = found(self.root, model, CLIENTS, count=6, **_SIZES)
        for name in CLIENTS:
            file = self.machines.client(name) / "client.toml"
            about = {"name": name, "server": self.machines.address, "device": "cpu"}
            file.write_text(tomli_w.dumps({"client": about}))
        with contextlib.suppress(_StopError):
            self._run(self.at, lambda round_: round_ == 1)
        shutil.copytree(self.at, self.before)
        with contextlib.suppress(_StopError):
            self._run(self.at, lambda round_: round_ == 3)
        self.end = self.go_on(shutil.copytree(self.at, self.root / "straight"))[0]

    @property
    def at(self) -> Path:
        """The folder that copies are damaged of."""
        return self.machines.root

    @property
    def before(self) -> Path:
        """What it was two rounds before."""
        return self.root / "before"

    def go_on(self, place: Path) -> tuple[object, Sequence[str]]:
        """Bring a copy to its end, server and clients; its bits."""
        self._run(place, lambda _: False)
        read_record(place / "server" / "state" / "run")
        states = {name: _states_of(place / "clients" / name / "state") for name in CLIENTS}
        run = place / "server" / "state" / "run"
        return (states, _states_of(run / "server"), scores_of(run)), ()

    def _run(self, place: Path, stop: Callable[[int], bool]) -> None:
        config = read_server_config(place / "server" / "federation.toml")
        members = {name: self._member(place / "clients" / name) for name in CLIENTS}
        if (config.place.run / "run.json").exists():
            live_of(follow(Reading(config.place.run)))
        with locked(config.place.folder):
            server_from(config, _Strict(members, stop=stop)).to_the_end()

    def _member(self, place: Path) -> member.Client:
        """A client as `fedalt client` opens it; its base model is loaded once for all cases."""
        config = read_client_config(place / "client.toml")
        known = self.prepared.get(config.place.name)
        with _prepared_once(known):
            opened = client_from(config)
        if known is None:
            settings = opened.trainer.task
            self.prepared[config.place.name] = Prepared(opened.parts, settings, {}, ())
        return opened


@contextlib.contextmanager
def _prepared_once(known: Prepared | None) -> Iterator[None]:
    before = opening.prepare
    if known is not None:
        opening.prepare = partial(prepare, base=known.parts.base)
    try:
        yield
    finally:
        opening.prepare = before


Whole = OfARun | OfAFederation


def damage(whole: Whole, place: Path, seed: int) -> Outcome:
    """Copy a folder, damage it as the seed says, go on with it; the copy is gone afterwards."""
    shutil.copytree(whole.at, place)
    draw = random.Random(seed)
    kind, files = _spoil(place, whole.before, draw)
    try:
        outcome = partial(Outcome, kind, tuple(str(file.relative_to(place)) for file in files))
        try:
            end, told = whole.go_on(place)
        except (ValueError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
            named = any(name in str(error) for file in files for name in _names_of(file))
            one = "\n" not in str(error) and _is_ours(error)
            return outcome(REFUSED if named and one else "AN ERROR THAT NAMES NOTHING", said)
        except Exception as error:
            return outcome("A FAULT", f"{type(error).__name__}: {error}")
        if end == whole.end:
            return outcome(SAME)
        if any(file.name in text for text in told for file in files):
            return outcome(NOTED, " ".join(told))
        return outcome("OTHER BITS")
    finally:
        shutil.rmtree(place)


def _states_of(place: Path) -> dict[str, str]:
    """The digest of every file that can be a state: of others nothing is said."""
    found = adapters_of(place)
    return {path: digest for path, digest in found.items() if Path(path).stem.isdecimal()}


def _names_of(file: Path) -> Iterator[str]:
    """One of these an error has to say: the file, or the client whose record of rounds it is.

    What a client answers the server names no path of its own. Many states have the same name, each
    in a folder of its own.
    """
    yield "/".join(file.parts[-2:]) if ".safetensors" in file.name else file.name
    if file.name == "accepted.json":
        yield f"client {file.parts[-3]!r}"


def _is_ours(error: Exception) -> bool:
    """Whether the command would show it as a user's error, see `fedalt.cli.errors`."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    ours = frames is not None and "fedalt" in frames.tb_frame.f_code.co_filename
    return isinstance(error, OSError | _RefusedError) or ours


def _spoil(place: Path, before: Path, draw: random.Random) -> tuple[str, list[Path]]:
    """Do one thing to a file or two; what, and to which. What cannot be done is drawn anew."""
    while True:
        kind, spoil = draw.choice(KINDS)
        file = draw.choice(files_of(place))
        done = spoil(Target(file, place, before / file.relative_to(place)), draw)
        if done is not None:
            return kind, done
