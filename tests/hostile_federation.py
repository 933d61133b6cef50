"""A federation in which some mean harm, played over and over with recorded honest answers.

Honest members answer once, for real. In every later play the same calls are answered from memory:
were a single call not the same byte for byte, there would be no answer to it.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from hostile import ANSWERS, CALLS, spoilt
from runs_for_tests import save_model, settings_for, write_clients

from fedalt.core.codec import decode, encode
from fedalt.core.container import unpack
from fedalt.engine.firewall import Firewall, Screening
from fedalt.federation.agreement import Agreement, write_agreement
from fedalt.federation.client import Client
from fedalt.federation.client_folder import open_client
from fedalt.federation.messages import NEVER, Answer, Call, digest
from fedalt.federation.rules import Rules
from fedalt.federation.server_folder import open_server
from fedalt.federation.transport import Lost
from fedalt.runs.quarantine import refusals
from fedalt.runs.setup import Parts, prepare

HONEST = ("a", "b", "c", "d", "e")
HOSTILE = ("w", "x", "y", "z")
FIREWALL = Firewall(norm_limit=10, max_upload_bytes=2**20)


@dataclass
class Recorded:
    """What honest members have answered, by the call's digest; of the hostile ones, too.

    `calls` are those of each client in their order.
    """

    terms: Agreement
    root: Path
    answers: dict[str, bytes] = field(default_factory=dict)
    calls: dict[str, list[bytes]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class Wire:
    """Carries calls to recorded answers, and what hostile clients make of theirs."""

    recorded: Recorded
    members: dict[str, Client]
    rng: random.Random | None = None  # None: the hostile clients say that they are away
    waiting: list[tuple[str, bytes]] = field(default_factory=list)

    def online(self) -> frozenset[str]:
        """Everyone."""
        return frozenset(self.recorded.terms.clients)

    def send(self, calls: Iterable[tuple[str, bytes]]) -> None:
        """Leave calls."""
        self.waiting += calls

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        """Answers to all calls."""
        calls, self.waiting = self.waiting, []
        return [(client_id, self._answer(client_id, data)) for client_id, data in calls]

    def _answer(self, client_id: str, data: bytes) -> bytes:
        call = digest(data)
        if client_id in self.members and call not in self.recorded.answers:
            self.recorded.answers[call] = self.members[client_id].answer(data)
            self.recorded.calls.setdefault(client_id, []).append(data)
        if client_id in HONEST:
            return self.recorded.answers[call]
        if self.rng is None or decode(Call, data).last:
            about = self.recorded.terms.name, self.recorded.terms.digest, client_id
            return encode(Answer(*about, decode(Call, data).round, NEVER, call, error="away"))
        kind, bad = spoilt(self._own(client_id, data, call), ANSWERS, self.rng)
        self.recorded.counts[kind] += 1
        return bad

    def _own(self, client_id: str, data: bytes, call: str) -> bytes:
        """What a hostile client would answer if it were not; it never has counted."""
        return self.recorded.answers[call]


def record(root: Path, method: str, **sections: dict[str, Any]) -> tuple[Recorded, Parts]:
    """Make a federation and play it once, with the hostile clients away."""
    clients = (*HONEST, *HOSTILE)
    model = save_model(root / "model")
    data = write_clients(root / "data", ("a", "b", "c", "d"))
    for each in clients:
        for split in ("train", "test"):
            source = data / f"{'abcd'[clients.index(each) % 4]}.{split}.jsonl"
            (root / f"data-{each}").mkdir(exist_ok=True)
            shutil.copy(source, root / f"data-{each}" / f"{each}.{split}.jsonl")
            if not (data / f"{each}.{split}.jsonl").exists():
                shutil.copy(source, data / f"{each}.{split}.jsonl")
    rounds = {"rounds": 3}
    prepared = prepare(
        settings_for(model, data, method={"name": method, "rank": 2}, rounds=rounds, **sections)
    )
    terms = write_agreement(root, "letters", clients, (), prepared.parts)
    recorded = Recorded(terms, root)
    members = {
        each: open_client(terms, each, root / f"data-{each}", root / f"state-{each}", device="cpu")
        for each in clients
    }
    play(recorded, root / "calm", None, members)
    return recorded, prepared.parts


def play(
    recorded: Recorded, folder: Path, seed: int | None, members: dict[str, Client] | None = None
) -> None:
    """One whole federation in a folder of its own; without a seed the hostile clients are away."""
    rng = None if seed is None else random.Random(seed)
    wire = Wire(recorded, members or {}, rng)
    gate = Screening(FIREWALL)
    open_server(recorded.terms, folder, wire, Rules(), gate, lambda _: None).to_the_end()


def result(folder: Path) -> dict[str, object]:
    """All that honest clients have of a federation: states, scores, costs, the tested round."""
    found: dict[str, object] = {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "server").rglob("*.safetensors"))
    }
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    found["lines"] = [
        {key: value for key, value in line.items() if key not in ("seconds", "peak_memory_bytes")}
        for line in lines
        if line.get("client") not in HOSTILE
    ]
    standing = json.loads((folder / "progress.json").read_text())
    progress = {key: standing[key] for key in ("rounds_done", "best", "tested")}
    return {**found, "progress": progress}


def counted(folder: Path) -> list[dict[str, Any]]:
    """What has counted of hostile clients: nothing."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("client") in HOSTILE and "refused" not in line]


def hostile_answers(recorded: Recorded, folder: Path, total: int, seed: int) -> list[str]:
    """Play until so many hostile answers were sent; what went wrong."""
    calm, wrong = result(recorded.root / "calm"), []
    before = recorded.counts.total()
    while (sent := recorded.counts.total() - before) < total:
        place = folder / f"play-{sent}"
        play(recorded, place, seed + sent)
        if result(place) != calm:
            wrong.append(f"seed {seed + sent}: honest clients have another result")
        if found := counted(place):
            wrong.append(f"seed {seed + sent}: it counts: {found[0]}")
        refused = len(refusals(place))
        if refused != (now := recorded.counts.total() - before - sent):
            wrong.append(f"seed {seed + sent}: {now} were sent, but {refused} refused")
        shutil.rmtree(place)
    return wrong


def hostile_calls(
    recorded: Recorded, parts: Parts, folder: Path, total: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """Call an honest member so often in ways no server does, between the calls it answers."""
    client_id, rng = HONEST[0], random.Random(seed)
    place, wrong, counts = folder / "state", [], Counter[str]()
    data = recorded.root / f"data-{client_id}"
    member = open_client(recorded.terms, client_id, data, place, device="cpu")
    honest = recorded.calls[client_id]
    assert member.parts.base.fingerprint == parts.base.fingerprint
    for at, call in enumerate(honest):
        before = _contents(place)
        for _ in range(at * total // len(honest), (at + 1) * total // len(honest)):
            kind, bad = spoilt(call, CALLS, rng)
            answer = decode(Answer, member.answer(bad), finite=True)
            counts[kind] += 1
            bare = replace(answer, error="", round=0, accepted=0, call="")
            about = recorded.terms.name, recorded.terms.digest, client_id
            if not answer.error or bare != Answer(*about, 0, 0, ""):
                wrong.append(f"call {at}: {kind} is carried out: {_outline(bad)}")
            elif not answer.error.isprintable() or str(folder) in answer.error:
                wrong.append(f"call {at}: {kind} is told as {answer.error!r}")
            if _contents(place) != before:
                wrong.append(f"call {at}: {kind} changes what is on the disk")
                before = _contents(place)
        if not _same(member.answer(call), recorded.answers[digest(call)]):
            wrong.append(f"call {at} has another answer than without the hostile ones")
    return counts, wrong


def _same(one: bytes, other: bytes) -> bool:
    """Equal answers, but for the seconds that they took."""
    mine, theirs = (
        replace(
            answer,
            costs=tuple(replace(cost, seconds=0.0) for cost in answer.costs),
        )
        for answer in (decode(Answer, one), decode(Answer, other))
    )
    return encode(mine) == encode(theirs)


def _outline(data: bytes) -> object:
    """What can be read of bytes, in short."""
    content, tensors = unpack(data)
    return content["facts"], {key: (each.shape, each.dtype) for key, each in tensors.items()}


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
