"""Changes between a server and clients apart: as in one process, and whole where one lacks them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from federations import founded
from runs_for_tests import save_model, scores_of
from test_federation import (
    CLIENTS,
    Killed,
    Place,
    Wire,
    key,
    place,
    scored,
    states_of,
)

from fedalt.core import codec, files
from fedalt.core.codec import decode, encode
from fedalt.core.declared import SettingsError
from fedalt.engine.changes import Change
from fedalt.federation import accepted
from fedalt.federation import client as member
from fedalt.federation import client_states as kept
from fedalt.federation import round_collector as desk
from fedalt.federation.messages import Answer, Call
from fedalt.federation.rules import Rules
from fedalt.federation.transport import Lost
from fedalt.flower.config import read_server_config
from fedalt.flower.revocation import revoke_key
from fedalt.methods.contract import Message
from fedalt.runs import folder as store
from fedalt.runs.lifecycle import start_run
from fedalt.runs.setup import prepare

TRAFFIC = {"upload": "int4", "download": "int8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Place, Wire]:
    """A federation of three rounds that nothing happens to."""
    there, _ = place(tmp_path_factory.mktemp("calm"), model, **sections())
    wire = Wire(there.members())
    there.host(wire).to_the_end()
    return there, wire


def sections() -> dict[str, dict[str, object]]:
    return {"rounds": {"rounds": 3}, "traffic": TRAFFIC}


def trained(folder: Path) -> dict[tuple[object, ...], tuple[int, int]]:
    return {
        (line["round"], line["client"]): (line["upload_bytes"], line["download_bytes"])
        for line in scores_of(folder)
        if line["kind"] == "train" and line["column"] == "own"
    }


def assert_same_bits(one: Path, other: Path, cls: type) -> None:
    for each in CLIENTS:
        mine, theirs = (states_of(root / f"state-{each}", each, cls) for root in (one, other))
        assert mine[0] == theirs[0]
        assert encode(mine[1]) == encode(theirs[1])


def test_apart_is_as_in_one_process(tmp_path: Path, model: Path, calm: tuple[Place, Wire]) -> None:
    there, wire = calm
    _, settings = place(tmp_path, model, **sections())
    start_run(prepare(settings), tmp_path / "run")
    for each in CLIENTS:
        cls = settings.method.client_state
        mine = states_of(there.root / f"state-{each}", each, cls)
        theirs = states_of(tmp_path / "run", each, cls)
        assert mine[0] == theirs[0]
        assert encode(mine[1]) == encode(theirs[1])
    server = scores_of(there.root / "server")
    apart = {key(line): line["metrics"] for line in server if scored(line)}
    whole = {key(line): line["metrics"] for line in scores_of(tmp_path / "run") if scored(line)}
    assert apart.keys() == whole.keys()
    assert all(apart[at] == pytest.approx(metrics, rel=1e-4) for at, metrics in whole.items())
    ours, theirs = trained(there.root / "server"), trained(tmp_path / "run")
    assert {at: up for at, (up, _) in ours.items()} == {at: up for at, (up, _) in theirs.items()}
    # A call is a little longer than its message.
    assert all(0 < ours[at][1] - theirs[at][1] < 1000 for at in ours)
    calls = [decode(Call, data) for _, data in wire.sent]
    changes = [call.round for call in calls if isinstance(call.message, Change)]
    assert sorted(changes) == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    answers = [decode(Answer, data) for data in wire.answered]
    assert not any(answer.error for answer in answers)
    assert all(isinstance(a.upload, Change) for a in answers if a.upload is not None)


@pytest.mark.parametrize("at", [30, 45, 60])
def test_killed_at_any_write_it_goes_on_with_the_same_bits(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    calm: tuple[Place, Wire],
    at: int,
) -> None:
    there, settings = place(tmp_path, model, **sections())
    writes = 0

    def dying(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == at:
            raise Killed
        files.atomic_write(path, data)

    for module in (accepted, codec, desk, kept, member, store):
        monkeypatch.setattr(module, "atomic_write", dying)
    with pytest.raises(Killed):
        there.host(Wire(there.members())).to_the_end()
    there.host(Wire(there.members())).to_the_end()
    assert_same_bits(tmp_path, calm[0].root, settings.method.client_state)
    assert scores_of(tmp_path / "server") == scores_of(calm[0].root / "server")


def test_a_client_that_lacks_what_it_was_sent_is_sent_all_of_it(
    tmp_path: Path, model: Path, calm: tuple[Place, Wire]
) -> None:
    there, settings = place(tmp_path, model, **sections())
    members = there.members()

    class Losing(Wire):
        def send(self, calls: object) -> None:
            for client_id, data in (found := list(calls)):
                if client_id == "b" and decode(Call, data).round == 2 and not self.asked_twice():
                    shutil.rmtree(tmp_path / "state-b" / "server" / "broadcast")
                    folder = tmp_path / "state-b" / "server" / "broadcast"
                    members["b"].accepted.kept.digests.forget_below(folder)
            super().send(found)

        def asked_twice(self) -> bool:
            return any(c == "b" and decode(Call, data).round == 2 for c, data in self.sent)

    wire = Losing(members)
    there.host(wire).to_the_end()
    calls = [decode(Call, data) for who, data in wire.sent if who == "b"]
    second = [call.message for call in calls if call.round == 2]
    assert [type(message) for message in second] == [Change, Message]
    assert_same_bits(tmp_path, calm[0].root, settings.method.client_state)
    calmly, ours = trained(calm[0].root / "server"), trained(tmp_path / "server")
    assert {at for at in ours if ours[at] != calmly[at]} == {(2, "b")}
    assert ours[2, "b"][1] > calmly[2, "b"][1]


@pytest.mark.parametrize("staleness", [0.0, 1.0])
def test_a_round_ends_with_so_many_uploads_and_late_ones_count_in_the_next(
    tmp_path: Path, model: Path, staleness: float
) -> None:
    sections = {"rounds": {"rounds": 3, "test": False}, "method": {"name": "fedit"}}
    there, _ = place(tmp_path, model, traffic={"upload": "int8"}, **sections)
    waiting: list[tuple[str, bytes]] = []

    class Slow(Wire):
        def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
            came = super().receive()
            slow = [(c, a) for c, a in came if c == "b" and decode(Answer, a).round == 0]
            waiting.extend(slow)
            if not slow and waiting and any(decode(Answer, a).round == 1 for _, a in came):
                return [waiting.pop(), *came]
            return [each for each in came if each not in slow]

    there.host(Slow(there.members()), buffer=2, late="count", staleness=staleness).to_the_end()
    own = [
        (line["round"], line["trained"], line["client"])
        for line in scores_of(tmp_path / "server")
        if line["kind"] == "train" and line["column"] == "own"
    ]
    assert own[:2] == [(0, 0, "a"), (0, 0, "c")]
    assert (1, 0, "b") in own
    assert not (tmp_path / "server" / "refused.jsonl").exists()


def test_rules_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SettingsError, match="count if late = 'count'"):
        Rules(staleness=0.5)
    with pytest.raises(SettingsError, match="buffer=2 is below minimum=3"):
        Rules(buffer=2, minimum=3)


def test_who_was_shut_out_for_a_while_goes_on_from_what_the_others_have(
    tmp_path: Path, model: Path
) -> None:
    """Where the server sends each client something else, in fewer bits."""
    about = {"method": {"name": "fedlease", "warm_up": 1}, "traffic": {"download": "int8"}}
    made = founded(tmp_path, model, rounds={"rounds": 3, "test": False}, **about)
    where = read_server_config(made.config).place
    made.go_on(changes={0: lambda: revoke_key(where, "c")})
    published = made.run / "server" / "published"
    last = {who: max(file.name for file in (published / who).iterdir()) for who in CLIENTS}
    assert last == dict.fromkeys(CLIENTS, "0002.safetensors")
