"""A run that is killed at any moment and resumed ends as if nothing had happened."""

import multiprocessing
import random
import re
import resource
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from federation import START
from runs_for_tests import adapters_of, save_model, scores_of, settings_for, write_clients

from fedalt.core.tree import Name
from fedalt.engine.schedule import Event
from fedalt.methods.contract import Message
from fedalt.methods.fedalt import FedALT
from fedalt.runs.checkpoints import FileStates
from fedalt.runs.folder import StoreError, locked, open_run
from fedalt.runs.length import is_finished
from fedalt.runs.lifecycle import reopen, resume_run, start_run
from fedalt.runs.setup import prepare
from fedalt.runs.standing import read_standing

KILLS = 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    model, data = save_model(folder / "model"), write_clients(folder / "data")
    return prepare(settings_for(model, data, training={"carry_optimizer": True}))


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """An undisturbed run, and how long it took."""
    run = tmp_path_factory.mktemp("straight") / "run"
    began = time.monotonic()
    start_run(prepared, run)
    return run, time.monotonic() - began


@dataclass(frozen=True)
class Slow:
    """A watcher who takes a moment at every event, so that kills hit every part of a run."""

    seconds: float = 0.0

    def on_event(self, event):
        time.sleep(self.seconds)

    def on_record(self, line):
        time.sleep(self.seconds)


@dataclass(frozen=True)
class StopsAt:
    """A watcher who interrupts the run at one event."""

    what: str
    round: int

    def on_event(self, event: Event):
        if (event.what, event.round) == (self.what, self.round):
            raise KeyboardInterrupt

    def on_record(self, line):
        pass


def go_on(prepared, run, watcher):
    if (run / "run.json").exists():
        resume_run(prepared, run, watcher)
    else:
        start_run(prepared, run, watcher)


@pytest.mark.parametrize("attempt", range(1))
def test_a_run_killed_at_ten_random_moments_ends_with_the_same_bits(
    prepared, straight, tmp_path, attempt
):
    expected, seconds = straight
    run = tmp_path / "run"
    moments = random.Random(attempt)
    fork = multiprocessing.get_context("fork")
    hit = 0
    while hit < KILLS:
        child = fork.Process(target=go_on, args=(prepared, run, Slow(0.002)))
        child.start()
        child.join(moments.uniform(0, seconds / 4))
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        hit += 1
    else:
        child = fork.Process(target=go_on, args=(prepared, run, Slow()))
        child.start()
        child.join()
    assert child.exitcode == 0
    assert hit >= 3, "the run ended before it could be killed"
    assert adapters_of(run) == adapters_of(expected)
    assert scores_of(run) == scores_of(expected)


@pytest.mark.parametrize(
    ("what", "round_"), [("train", 0), ("train", 2), ("validate", 1), ("test", 3)]
)
def test_a_run_interrupted_in_any_phase_goes_on(prepared, straight, tmp_path, what, round_):
    run = tmp_path / "run"
    chosen = max(line["round"] for line in scores_of(straight[0]) if line.get("split") == "test")
    with pytest.raises(KeyboardInterrupt):
        start_run(prepared, run, StopsAt(what, chosen if what == "test" else round_))
    resume_run(reopen(run), run)
    assert adapters_of(run) == adapters_of(straight[0])
    assert scores_of(run) == scores_of(straight[0])


@dataclass(frozen=True)
class StopsAtSummary(Slow):
    """A watcher who interrupts the run when its last line is written and does not count yet."""

    def on_record(self, line):
        if line["kind"] == "summary":
            raise KeyboardInterrupt


def test_a_tested_run_without_its_summary_is_not_finished_and_gets_it(prepared, straight, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start_run(prepared, run, StopsAtSummary())
    assert read_standing(run).tested
    assert not is_finished(run)
    resume_run(prepared, run)
    assert is_finished(run)
    assert scores_of(run) == scores_of(straight[0])


@dataclass(frozen=True)
class FillsTheDisk:
    """A watcher after whom no file has room for a client's state, from a round's training on."""

    round: int

    def on_event(self, event: Event):
        if (event.what, event.round) == ("train", self.round):
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))

    def on_record(self, line):
        pass


def test_a_state_that_finds_no_room_ends_the_run_before_its_round_counts(prepared, tmp_path):
    settings = prepared.parts.settings
    lora = replace(settings.method.lora, rank=16)
    wide = prepare(replace(settings, method=replace(settings.method, lora=lora)))
    straight, run = tmp_path / "straight", tmp_path / "run"
    start_run(wide, straight)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=f"File too large: '{run}.*0002.safetensors'"):
            start_run(wide, run, FillsTheDisk(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert open_run(run).rounds_done() == 2
    resume_run(reopen(run), run)
    assert adapters_of(run) == adapters_of(straight)
    assert scores_of(run) == scores_of(straight)


def test_a_second_process_is_kept_out(prepared, straight):
    run, _ = straight
    fork = multiprocessing.get_context("fork")
    refused = fork.Event()

    def intrude():
        try:
            resume_run(prepared, run)
        except StoreError:
            refused.set()

    with locked(run):
        child = fork.Process(target=intrude)
        child.start()
        child.join()
    assert refused.is_set()


def test_states_of_the_last_two_rounds_and_the_best_are_kept(straight):
    run, _ = straight
    for key in ("clients/a", "server", "local/clients/a"):
        kept = sorted(int(path.stem) for path in (run / key).glob("*.safetensors"))
        assert {2, 3} <= set(kept)
        assert len(kept) <= 3


def test_other_data_are_noticed(prepared, straight, tmp_path):
    run, _ = straight
    data = Path(prepared.parts.settings.data.path)
    file = data / "a.train.jsonl"
    before = file.read_text()
    file.write_text(before.replace("yes", "yeah"))
    try:
        with pytest.raises(StoreError, match="other client data"):
            reopen(run)
    finally:
        file.write_text(before)


def test_a_changed_path_that_leads_nowhere_is_told_with_its_file(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    file = run / "settings.toml"
    file.write_text(re.sub(r'(?m)^path = ".*"', 'path = "/nowhere/data"', file.read_text()))
    with pytest.raises(StoreError, match=r"settings\.toml was changed: \[data\] path .*: no such"):
        reopen(run)


def test_uploads_lie_in_files_from_the_first_round_on(tmp_path):
    states = FileStates(tmp_path, 0)
    server = states.backed("server", FedALT().init_server(START))
    latest = server.latest.put("a", Message({Name("s", "t", "A"): torch.ones(2)}))
    assert len(list((tmp_path / "server" / "latest" / "a").iterdir())) == 1
    assert "a" in latest
    assert latest["a"].tree
    assert "a" not in server.latest  # for whoever has not put it, it counts from the next round on
    assert FileStates(tmp_path, 1).backed("server", server).latest["a"].tree
