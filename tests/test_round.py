"""A round is a loop: the cohort trains, uploads are screened and wait on disk, then aggregated."""

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import MemoryStates, simulate
from runs_for_tests import save_model, settings_for, write_clients
from test_contract import ALL, SMALL

import fedalt
from fedalt.core import tree as trees
from fedalt.core.reading import StoreError
from fedalt.engine.blame import MethodFailed
from fedalt.methods.contract import Message
from fedalt.methods.fedit import FedIT
from fedalt.runs.lifecycle import start_run
from fedalt.runs.setup import prepare
from fedalt.training import loss

MOST_FRAMES = 12
FEDIT = FedIT(lora=SMALL)


@dataclass(frozen=True)
class Changed:
    """FedIT with an aggregate of its own."""

    own: Any
    method: FedIT = FEDIT

    def __getattr__(self, name):
        return getattr(self.method, name)

    def aggregate(self, server, replies):
        return self.own(self.method, server, replies)


def test_a_method_whose_aggregate_reads_nothing_has_all_its_clients_trained():
    states, costs = simulate(Changed(lambda method, server, replies: server), [ALL])
    expected, _ = simulate(FEDIT, [ALL])
    assert [(cost.client_id, cost.refused) for cost in costs] == [(who, None) for who in ALL]
    assert all(cost.upload_bytes for cost in costs)
    assert {key for key in states if key != "server"} == {f"clients/{who}" for who in ALL}
    for who in ALL:
        ours, theirs = states[f"clients/{who}"], expected[f"clients/{who}"]
        assert all(trees.equal(vars(ours)[part], tree) for part, tree in vars(theirs).items())
    assert not trees.equal(states["server"].adapter, expected["server"].adapter)


def test_uploads_wait_on_disk_until_all_clients_have_trained():
    trained, folders = [], []

    class Watched(MemoryStates):
        def put(self, key, value):
            trained.append(key)
            super().put(key, value)

    def aggregate(method, server, replies):
        assert trained == [f"clients/{who}" for who in ALL]
        first = next(replies)
        assert first[0] == "a"
        folder = replies.gi_frame.f_locals["self"].folder
        assert len(list(folder.iterdir())) == len(ALL)
        folders.append(folder)
        return method.aggregate(server, [first, *replies])

    states, _ = simulate(Changed(aggregate), [ALL], Watched())
    assert not folders[0].exists()
    expected, _ = simulate(FEDIT, [ALL])
    assert trees.equal(states["server"].adapter, expected["server"].adapter)


def test_an_upload_that_breaks_the_method_is_rejected_and_the_others_are_aggregated():
    def fragile(method, server, replies):
        read = dict(replies)
        if "b" in read and float(next(iter(read["b"].tree.values())).abs().max()) > 0.1:
            raise ZeroDivisionError("by what b has sent")
        return method.aggregate(server, read.items())

    states, costs = simulate(Changed(fragile), [ALL])
    reasons = {cost.client_id: cost.refused for cost in costs}
    assert reasons["a"] is None
    assert reasons["c"] is None
    assert "cannot aggregate it: ZeroDivisionError: by what b has sent" in reasons["b"]
    assert "clients/b" not in states
    expected, _ = simulate(FEDIT, [("a", "c")])
    assert trees.equal(states["server"].adapter, expected["server"].adapter)


def test_a_method_that_fails_whatever_it_reads_says_so():
    def broken(method, server, replies):
        raise KeyError("always")

    with pytest.raises(MethodFailed, match=r"cannot aggregate .* no client can be blamed.*a, b, c"):
        simulate(Changed(broken), [ALL])


def test_a_damaged_file_of_the_run_is_no_uploads_fault():
    def damaged(method, server, replies):
        if "b" in dict(replies):  # what the server itself keeps of b
            raise StoreError("server/latest/b/0001.safetensors is missing")
        return server

    with pytest.raises(StoreError, match="is missing"):
        simulate(Changed(damaged), [ALL])


def test_a_message_without_content_is_aggregated_too():
    def counted(method, server, replies):
        assert [message for _, message in replies] == [Message({}, {})] * len(ALL)
        return server

    @dataclass(frozen=True)
    class Silent(Changed):
        def local(self, client, message):
            after, _ = yield from self.method.local(client, message)
            return after, Message({})

    _, costs = simulate(Silent(counted), [ALL])
    assert [cost.upload_bytes for cost in costs] == [0] * len(ALL)


def test_from_the_schedule_to_the_loss_there_are_few_frames(tmp_path, monkeypatch, capsys):
    model, data = save_model(tmp_path / "model"), write_clients(tmp_path / "data")
    prepared = prepare(settings_for(model, data, rounds={"rounds": 1, "test": False}))
    inside, package = loss.cross_entropy, str(Path(fedalt.__file__).parent)
    stacks = []

    def watched(logits, targets):
        frames = [frame for frame in traceback.extract_stack() if package in frame.filename]
        names = [frame.name for frame in frames]
        if "to_the_end" in names and torch.is_grad_enabled():
            stacks.append(frames[names.index("to_the_end") :])
        return inside(logits, targets)

    monkeypatch.setattr(loss, "cross_entropy", watched)
    start_run(prepared, tmp_path / "run")
    frames = max(stacks, key=len)
    with capsys.disabled():
        for frame in frames:
            print(f"\n  {Path(frame.filename).relative_to(package)}:{frame.name}", end="")
        print("\n  training/loss.py:cross_entropy")
    assert {"run_round", "train_together"} <= {frame.name for frame in frames}
    assert len(frames) + 1 <= MOST_FRAMES
