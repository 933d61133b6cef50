"""Clients that cannot, and clients that are shut out: no round waits for them for ever."""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from machines import Machines, Wire, found
from runs_for_tests import scores_of

from fedalt.core.codec import decode, encode
from fedalt.federation import client as member
from fedalt.federation import round_collector as desk
from fedalt.federation.client_folder import open_client
from fedalt.federation.messages import Answer, Call
from fedalt.federation.roster import Roster, update_members, write_roster
from fedalt.federation.transport import Lost
from fedalt.flower.config import ServerConfig, read_client_config, read_server_config, server_from
from fedalt.flower.credentials import make_client_key
from fedalt.flower.revocation import record_revoked, revoke_key
from fedalt.runs import folder as store
from fedalt.runs import standing

CLIENTS = ("a", "b", "c")


@pytest.fixture
def machines(tmp_path: Path, tiny_model_dir: Path) -> Machines:
    return found(tmp_path, tiny_model_dir, CLIENTS, rounds={"rounds": 2, "test": False})


def config_of(there: Machines, **rules: Any) -> ServerConfig:
    config = read_server_config(there.server / "federation.toml")
    return replace(config, rules=replace(config.rules, **rules))


def members(there: Machines) -> dict[str, Any]:
    def opened(name: str) -> member.Client:
        config = read_client_config(there.client(name) / "client.toml")
        return open_client(config.terms, name, config.place.data, config.place.folder, device="cpu")

    return {each: opened(each) for each in CLIENTS}


def trained(there: Machines) -> set[tuple[int, str]]:
    return {
        (line["round"], line["client"])
        for line in scores_of(there.run)
        if line["kind"] == "train" and line["column"] == "own"
    }


EVERY = {(round_, client) for round_ in (0, 1) for client in CLIENTS}


def test_a_round_goes_on_without_a_client_that_cannot(machines: Machines) -> None:
    config = config_of(machines)
    server_from(config, Wire(members(machines), {(1, "c")})).to_the_end()
    assert trained(machines) == EVERY - {(1, "c")}
    assert "round 2: c: left out" in (config.place.logs / "server.log").read_text()


@dataclass
class Hesitant(Wire):
    """A wire to a client that cannot at first."""

    times: int = 2
    statuses: list[dict[str, Any]] = field(default_factory=list)
    status: Path = Path()

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        if self.status.exists():
            self.statuses.append(json.loads(self.status.read_text()))
        return super().receive()

    def _answer(self, client_id: str, data: bytes) -> bytes:
        call = decode(Call, data)
        answer = super()._answer(client_id, data)
        if client_id == "c" and call.round == 1 and call.train and self.times:
            self.times -= 1
            bare = replace(decode(Answer, answer), upload=None, scores=(), costs=())
            return encode(replace(bare, error="no memory"))
        return answer


def test_with_too_few_uploads_a_client_that_cannot_is_asked_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_REST", 0.0)
    wire = Hesitant(members(machines), status=machines.run / "status.json")
    server_from(config_of(machines, minimum=3), wire).to_the_end()
    assert trained(machines) == EVERY
    assert {"c": "no memory"} in [each["unable"] for each in wire.statuses]


@dataclass
class Slow(Hesitant):
    """One on which b's upload of round 1 comes when c has been called again, c's after it."""

    held: list[tuple[str, bytes | Lost]] = field(default_factory=list)
    both: bool = False

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        now = []
        for who, came in super().receive():
            assert isinstance(came, bytes)
            answer = decode(Answer, came)
            is_held = who != "a" and answer.round == 1 and answer.upload is not None
            (self.held if is_held else now).append((who, came))
        self.both |= {who for who, _ in self.held} == {"b", "c"}
        return [*now, self.held.pop(0)] if self.both and self.held else now


def test_who_is_called_again_is_waited_for(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_REST", 0.0)
    wire = Slow(members(machines), times=1, status=machines.run / "status.json")
    server_from(config_of(machines), wire).to_the_end()
    assert trained(machines) == EVERY
    assert wire.statuses[-1]["unable"] == {}
    assert {"c": "no memory"} in [each["unable"] for each in wire.statuses]


def test_a_full_disk_is_an_answer_and_the_next_round_goes_on(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = member.atomic_write

    def full(path: Path, data: bytes) -> None:
        if path.name == "answer.bin" and is_first_of_c(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    def is_first_of_c(data: bytes) -> bool:
        answer = decode(Answer, data)
        return (answer.client, answer.round) == ("c", 0)

    monkeypatch.setattr(member, "atomic_write", full)
    config = config_of(machines)
    server_from(config, Wire(members(machines))).to_the_end()
    assert trained(machines) == EVERY - {(0, "c")}
    said = (config.place.logs / "server.log").read_text()
    assert "round 1: c: client 'c': No space left on device: answer.bin\n" in said
    assert str(machines.root / "clients") not in said


@dataclass
class Without(Wire):
    """A wire that c never comes to; its key is revoked while it is waited for."""

    config: ServerConfig | None = None

    def online(self) -> frozenset[str]:
        return super().online() - {"c"}

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        came = super().receive()
        if not came and self.config is not None:
            revoke_key(self.config.place, "c")
            self.config = None
        return came


def test_a_revoked_client_is_not_waited_for(machines: Machines) -> None:
    config = config_of(machines)
    server_from(config, Without(members(machines), config=config)).to_the_end()
    assert trained(machines) == {pair for pair in EVERY if pair[1] != "c"}


class Ending(Wire):
    """A wire on which c is away, and a call of before to it is lost only now."""

    def online(self) -> frozenset[str]:
        return frozenset({"a", "b"})

    def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
        calls, self.waiting = self.waiting, []
        return [("c", Lost("it was away")), *((who, b"") for who, _ in calls)]


def test_who_was_away_at_the_farewell_counts_as_not_told(machines: Machines) -> None:
    told: list[str] = []
    host = replace(server_from(config_of(machines), Ending({})), say=told.append)
    host._farewell(host.folder.progress(), {})
    assert any(line.startswith("not told that it has ended: c;") for line in told)


def test_no_round_begins_while_all_keys_are_revoked(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(machines)

    def let_in(_: float) -> None:
        make_client_key(machines.root / "new.key", config.place.clients / "c.pub")
        record_revoked(config.place)

    monkeypatch.setattr("fedalt.federation.roster.sleep", let_in, raising=False)
    host = server_from(config, Wire(members(machines)))
    for name in CLIENTS:
        revoke_key(config.place, name)
    host.to_the_end()
    assert trained(machines) == {(0, "c"), (1, "c")}
    assert "nobody takes part; this waits" in (config.place.logs / "server.log").read_text()


def test_a_key_that_is_revoked_while_somebody_joins_leaves_a_readable_run(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = server_from(config := config_of(machines), Wire(members(machines)))
    host.to_the_end()  # from its first round on run.json is sealed
    operator = Thread(target=revoke_key, args=(config.place, "c"))
    plain = standing.write_facts

    def slow(path: Path, facts: Any) -> None:
        if not operator.ident and "d" in facts["clients"]:
            operator.start()  # after the facts were read, before they are written
            operator.join(0.3)
        plain(path, facts)

    monkeypatch.setattr(store, "write_facts", slow)
    roster = Roster(1, added=("d",))
    write_roster(config.roster, roster)
    update_members(host.folder, config.roster, config.terms, 2, print)
    operator.join()
    assert sorted(host.folder.facts()["clients"]) == ["a", "b", "c", *roster.added]
    assert host.folder.left() == {"c"}


def test_a_client_with_a_new_key_takes_part_again_and_one_that_has_left_does_not(
    machines: Machines,
) -> None:
    config = config_of(machines)
    host = server_from(config, Wire({}))
    host.folder.add_facts({"left": ["a"]})
    revoke_key(config.place, "c")
    assert host.folder.left() == {"a", "c"}
    make_client_key(machines.root / "new.key", config.place.clients / "c.pub")
    assert server_from(config, Wire({})).folder.left() == {"a"}
