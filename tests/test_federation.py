"""Server and clients apart, without a network: the same numbers as in one process."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from runs_for_tests import save_model, scores_of, settings_for, write_clients

from fedalt.core import codec, files
from fedalt.core.codec import decode, encode, read
from fedalt.core.tree import Tree
from fedalt.engine.firewall import Firewall, Screening
from fedalt.federation import accepted
from fedalt.federation import client as member
from fedalt.federation import client_states as kept
from fedalt.federation import round_collector as desk
from fedalt.federation.agreement import Agreement, write_agreement
from fedalt.federation.client import Client
from fedalt.federation.client_folder import open_client
from fedalt.federation.messages import Answer, Call
from fedalt.federation.rules import Rules
from fedalt.federation.server import Server
from fedalt.federation.server_folder import open_server
from fedalt.federation.transport import Lost
from fedalt.methods import METHODS
from fedalt.methods.contract import Message
from fedalt.runs import folder as store
from fedalt.runs.lifecycle import start_run
from fedalt.runs.quarantine import refusals
from fedalt.runs.settings import Settings
from fedalt.runs.setup import prepare

CLIENTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@dataclass
class Wire:
    """Carries bytes between a host and members in this process; `spoil` may change an answer."""

    members: dict[str, Client]
    spoil: Callable[[str, bytes], bytes | Lost] = lambda _, data: data
    waiting: list[tuple[str, bytes]] = field(default_factory=list)
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    answered: list[bytes] = field(default_factory=list)

    def online(self) -> frozenset[str]:
        return frozenset(self.members)

    def send(self, calls: Iterable[tuple[str, bytes]]) -> None:
        self.waiting += (found := list(calls))
        self.sent += found

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        came = []
        for client_id, data in self.waiting:
            answer = self.members[client_id].answer(data)
            self.answered.append(answer)
            came.append((client_id, self.spoil(client_id, answer)))
        self.waiting.clear()
        return came


@dataclass(frozen=True)
class Place:
    """Where a federation lies: its terms, a data folder and a state folder for each client."""

    root: Path
    terms: Agreement

    def member(self, client_id: str) -> Client:
        data, folder = self.root / f"data-{client_id}", self.root / f"state-{client_id}"
        return open_client(self.terms, client_id, data, folder, device="cpu")

    def members(self) -> dict[str, Client]:
        return {each: self.member(each) for each in self.terms.clients}

    def host(self, wire: Wire, firewall: Firewall | None = None, **rules: object) -> Server:
        gate = Screening(firewall or Firewall())
        return open_server(self.terms, self.root / "server", wire, Rules(**rules), gate, print)


def place(root: Path, model: Path, **sections: dict[str, object]) -> tuple[Place, Settings]:
    settings = settings_for(model, write_clients(root / "data", CLIENTS), **sections)
    for each in CLIENTS:
        write_clients(root / f"data-{each}", [each])
    prepared = prepare(settings)
    terms = write_agreement(root, "letters", CLIENTS, (), prepared.parts)
    return Place(root, terms), settings


def states_of(folder: Path, client_id: str, cls: type) -> object:
    newest = max((folder / "clients" / client_id).glob("*.safetensors"))
    return newest.name, read(cls, newest)


def assert_close(one: object, other: object) -> None:
    """Equal trees to float tolerance, everything else the same."""
    for name, value in vars(one).items():
        if isinstance(value, dict):
            _assert_close_trees(value, vars(other)[name])
        elif is_dataclass(value):
            assert_close(value, vars(other)[name])
        else:
            assert value == vars(other)[name]


def _assert_close_trees(one: Tree, other: Tree) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


# Ranks of their own, for the methods that are about them; groups early enough to be seen.
SETTINGS: dict[str, dict[str, object]] = {
    "fedlease": {"warm_up": 1},
    "hilora": {"root_rounds": 1, "cluster_rounds": 1},
    "fedtree_lora": {"warm_up": 1, "width": 3, "one_group": -1.0},
    **{name: {"ranks": {"a": 1, "b": 2}} for name in ("flexlora", "florist", "owner_mean")},
    **{name: {"ranks": {"a": 1, "b": 2}} for name in ("hetlora", "fedilora", "flora", "fslora")},
}


@pytest.mark.parametrize("name", METHODS)
def test_apart_is_as_in_one_process(tmp_path: Path, model: Path, name: str) -> None:
    method = {"name": name, **SETTINGS.get(name, {})}
    there, settings = place(tmp_path, model, rounds={"rounds": 3}, method=method)
    wire = Wire(there.members())
    there.host(wire).to_the_end()
    start_run(prepare(settings), tmp_path / "run")
    for each in CLIENTS:
        name, mine = states_of(tmp_path / f"state-{each}", each, settings.method.client_state)
        wanted, theirs = states_of(tmp_path / "run", each, settings.method.client_state)
        assert name == wanted
        assert_close(mine, theirs)
    apart = {key(line): line["metrics"] for line in scores_of(tmp_path / "server") if scored(line)}
    whole = {key(line): line["metrics"] for line in scores_of(tmp_path / "run") if scored(line)}
    assert apart.keys() == whole.keys()
    for each, metrics in whole.items():
        assert apart[each] == pytest.approx(metrics, rel=1e-4)


def scored(line: dict[str, object]) -> bool:
    return line["kind"] == "score"


def key(line: dict[str, object]) -> tuple[object, ...]:
    return line["split"], line["round"], line["client"], line["column"]


def spoilt(answer: bytes, change: Callable[[Message], Message]) -> bytes:
    whole = decode(Answer, answer)
    assert whole.upload is not None
    return encode(replace(whole, upload=change(whole.upload)))


def filled(value: float) -> Callable[[Message], Message]:
    return lambda upload: replace(
        upload, tree={name: torch.full_like(each, value) for name, each in upload.tree.items()}
    )


def without_one(upload: Message) -> Message:
    return replace(upload, tree=dict(list(upload.tree.items())[1:]))


def of_another_shape(upload: Message) -> Message:
    return replace(upload, tree={name: each[:, :1] for name, each in upload.tree.items()})


BAD: dict[str, Callable[[bytes], bytes]] = {
    "NaN": lambda answer: spoilt(answer, filled(float("nan"))),
    "a tensor too few": lambda answer: spoilt(answer, without_one),
    "other shapes": lambda answer: spoilt(answer, of_another_shape),
    "truncated": lambda answer: answer[: len(answer) // 2],
    "gigantic": lambda answer: answer + bytes(2**21),
    "another client": lambda answer: encode(replace(decode(Answer, answer), client="c")),
    "another round": lambda answer: encode(replace(decode(Answer, answer), round=0)),
    "of nobody": lambda _: b"",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_refused_upload_counts_as_not_taking_part(tmp_path: Path, model: Path, kind: str) -> None:
    rounds = {"rounds": {"rounds": 3, "evaluate_every": 3, "test": False}}
    (tmp_path / "bad").mkdir()
    (tmp_path / "without").mkdir()
    bad, settings = place(tmp_path / "bad", model, **rounds)
    without, _ = place(tmp_path / "without", model, **rounds)

    def spoil(client_id: str, answer: bytes) -> bytes | Lost:
        ours = client_id == "b" and decode(Answer, answer).round == 1
        return BAD[kind](answer) if ours else answer

    def lose(client_id: str, answer: bytes) -> bytes | Lost:
        ours = client_id == "b" and decode(Answer, answer).round == 1
        return Lost("for the test") if ours else answer

    wire = Wire(bad.members(), spoil)
    bad.host(wire, firewall=Firewall(max_upload_bytes=2**20)).to_the_end()
    without.host(Wire(without.members(), lose), deadline=1e-3).to_the_end()
    for each in CLIENTS:
        mine = states_of(bad.root / f"state-{each}", each, settings.method.client_state)
        theirs = states_of(without.root / f"state-{each}", each, settings.method.client_state)
        assert mine[0] == theirs[0]
        assert encode(mine[1]) == encode(theirs[1])
    (refusal,) = refusals(bad.root / "server")
    assert (refusal["client"], refusal["round"]) == ("b", 1)


def test_an_upload_far_larger_than_the_others_is_refused(tmp_path: Path, model: Path) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 2, "test": False})

    def spoil(client_id: str, answer: bytes) -> bytes | Lost:
        ours = client_id == "b" and decode(Answer, answer).upload is not None
        return spoilt(answer, filled(1e30)) if ours else answer

    there.host(Wire(there.members(), spoil), firewall=Firewall(norm_limit=10)).to_the_end()
    assert [(line["client"], line["round"]) for line in refusals(tmp_path / "server")] == [
        ("b", 0),
        ("b", 1),
    ]


class Killed(BaseException):
    """What a kill is to the code that it hits."""


@pytest.mark.parametrize("at", range(3, 60, 14))
def test_killed_at_any_write_it_goes_on_with_the_same_bits(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    rounds = {"rounds": {"rounds": 2, "test": False}}
    (tmp_path / "killed").mkdir()
    (tmp_path / "calm").mkdir()
    killed, settings = place(tmp_path / "killed", model, **rounds)
    calm, _ = place(tmp_path / "calm", model, **rounds)
    calm.host(Wire(calm.members())).to_the_end()
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
        killed.host(Wire(killed.members())).to_the_end()
    killed.host(Wire(killed.members())).to_the_end()
    for each in CLIENTS:
        mine = states_of(killed.root / f"state-{each}", each, settings.method.client_state)
        theirs = states_of(calm.root / f"state-{each}", each, settings.method.client_state)
        assert mine[0] == theirs[0]
        assert encode(mine[1]) == encode(theirs[1])
    assert scores_of(killed.root / "server") == scores_of(calm.root / "server")


@pytest.mark.parametrize("late", ["count", "drop"])
def test_a_late_upload_counts_in_the_next_round_or_is_dropped(
    tmp_path: Path, model: Path, late: str
) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 3, "test": False})
    kept: list[tuple[str, bytes]] = []

    class Slow(Wire):
        def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
            came = super().receive()
            slow = [(c, a) for c, a in came if c == "b" and decode(Answer, a).round == 0]
            kept.extend(slow)
            if not slow and kept and any(decode(Answer, a).round == 1 for _, a in came):
                return [kept.pop(), *came]
            return [each for each in came if each not in slow]

    there.host(Slow(there.members()), deadline=1e-3, late=late).to_the_end()
    trained = [
        (line["round"], line["trained"])
        for line in scores_of(tmp_path / "server")
        if line["kind"] == "train" and line["client"] == "b" and line["column"] == "own"
    ]
    assert trained == ([(1, 0), (2, 2)] if late == "count" else [(1, 1), (2, 2)])


def test_nothing_private_crosses_the_wire(tmp_path: Path, model: Path) -> None:
    there, settings = place(tmp_path, model, rounds={"rounds": 2})
    members = there.members()
    wire = Wire(members)
    there.host(wire).to_the_end()
    crossed = b"\0".join([*(data for _, data in wire.sent), *wire.answered])
    for each in CLIENTS:
        _, state = states_of(tmp_path / f"state-{each}", each, settings.method.client_state)
        for tensor in state.mixer.values():
            for row in tensor.numpy().reshape(-1, 4):
                assert row.tobytes() not in crossed
        for tensor in state.individual.values():  # that the search can find what is there
            assert tensor.numpy().tobytes()[:16] in crossed
        task = members[each].trainer.task
        for split in ("train", "validation", "test"):
            for record, example in zip(
                task.records(each, split), task.examples(each, split), strict=True
            ):
                assert record.instruction.encode() not in crossed
                for size in (torch.int32, torch.int64):
                    ids = torch.tensor(example.ids[:4], dtype=size)
                    assert ids.numpy().tobytes() not in crossed
                assert ", ".join(map(str, example.ids[:4])).encode() not in crossed


def test_the_same_call_has_the_same_answer_after_a_restart(tmp_path: Path, model: Path) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 1, "test": False})
    wire = Wire(there.members())
    there.host(wire).to_the_end()
    call = first_call(wire, "a")
    first = there.member("a").answer(call)
    assert there.member("a").answer(call) == first


def first_call(wire: Wire, client_id: str) -> bytes:
    return next(data for each, data in wire.sent if each == client_id)


def call_of(there: Place, **changes: object) -> bytes:
    method, init = there.terms.settings.method, there.terms.init
    message = method.broadcast(method.init_server(init), "a")
    whole = Call(there.terms.name, there.terms.digest, "a", 0, -1, True, message)
    return encode(replace(whole, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"federation": "other"}, "the call is for federation 'other'"),
        ({"client": "b"}, "the call is for client 'b'"),
        ({"terms": "x"}, "the call is for terms 'x'"),
        ({"accepted": 4}, "counts an upload of round 5, but this client has no state of it"),
    ],
)
def test_a_client_refuses_a_call_that_is_not_for_it(
    tmp_path: Path, model: Path, changes: dict[str, object], says: str
) -> None:
    there, _ = place(tmp_path, model)
    answer = decode(Answer, there.member("a").answer(call_of(there, **changes)))
    assert says in answer.error
    assert answer.upload is None


def test_an_old_call_does_not_set_a_client_back(tmp_path: Path, model: Path) -> None:
    there, settings = place(tmp_path, model, rounds={"rounds": 3, "test": False})
    wire = Wire(there.members())
    there.host(wire).to_the_end()
    name, _ = states_of(tmp_path / "state-a", "a", settings.method.client_state)
    old = first_call(wire, "a")
    answer = decode(Answer, there.member("a").answer(old))
    assert "says that no round has counted, but it said 3 before" in answer.error
    assert states_of(tmp_path / "state-a", "a", settings.method.client_state)[0] == name
