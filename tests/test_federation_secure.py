"""Secure sums in federations whose server, clients and folders are real and share a process."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from commands import call as run_command
from federations import Federation, Stopped, Wire, founded, round_of
from runs_for_tests import adapters_of, save_model, scores_of
from scipy.stats import chisquare

from fedalt.core.codec import CodecError, decode, encode, read, write
from fedalt.core.declared import SettingsError
from fedalt.core.tree import Tree
from fedalt.engine.changes import Change, whole
from fedalt.engine.states import client_of, server_of
from fedalt.federation import answer_forms, secure_calls, secure_client, secure_sum
from fedalt.federation.answer_schema import Asked
from fedalt.federation.client import Client
from fedalt.federation.messages import NEVER, Answer, Call, SumAnswer, SumCall, digest
from fedalt.federation.secure_client import MASKED, Session
from fedalt.federation.secure_keys import digest_of_sent, signed_of
from fedalt.federation.secure_sum import steps_of
from fedalt.federation.transport import Lost
from fedalt.flower.config import read_server_config, server_from
from fedalt.flower.roster_changes import add_clients, remove_client, rotate_key
from fedalt.methods import METHODS
from fedalt.methods.contract import Message
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import start_run
from fedalt.runs.setup import prepare

FOUR = ("a", "b", "c", "d")
SHORT: dict[str, Any] = {"rounds": {"rounds": 3, "test": False, "evaluate_every": 3}}
SECURE: dict[str, Any] = {"privacy": {"secure_sum": True}}
ADMITTED = ("fedalt", "fedit", "ffa_lora", "fedsa_lora", "rolora", "feddpa", "pf2lora", "fdlora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def step_of(data: bytes) -> str:
    """Which step of a secure sum an answer is about, by what it holds; "" for another."""
    try:
        answer = decode(SumAnswer, data)
    except CodecError:
        return ""
    kinds = {"share": answer.sealed, "mask": answer.masked, "unmask": answer.seeds}
    return next((step for step, content in kinds.items() if content), "")


def sent_after(place: Federation, round_: int) -> Tree:
    """What the server sends after a round."""
    config, run = read_server_config(place.config), open_run(place.run)
    method, init = config.terms.settings.method, config.terms.init
    server = server_of(method, init, run.states("own", round_ + 1))
    return dict(method.broadcast(server, "a").tree)


def hurry(place: Federation, deadline: float) -> None:
    """Let a round go on without those that do not answer."""
    text = place.config.read_text()
    place.config.write_text(text.replace("[rules]", f"[rules]\ndeadline = {deadline}"))


def trained(place: Federation, round_: int) -> dict[str, str | None]:
    """Who has trained in a round, and why an upload did not count."""
    return {
        line["client"]: line.get("refused")
        for line in scores_of(place.run)
        if line["kind"] == "train" and line["column"] == "own" and line["round"] == round_
    }


def with_method(name: str, sections: dict[str, Any]) -> dict[str, Any]:
    return {**SHORT, **sections, "method": {"name": name}}


@pytest.mark.parametrize(
    "name", [*ADMITTED[:2], *(pytest.param(name, marks=pytest.mark.long) for name in ADMITTED[2:])]
)
def test_a_federation_comes_to_what_it_comes_to_without(
    tmp_path: Path, model: Path, name: str
) -> None:
    plain = founded(tmp_path / "plain", model, **with_method(name, {}))
    secure = founded(tmp_path / "secure", model, **with_method(name, SECURE))
    for place in (plain, secure):
        place.go_on()
    for round_ in range(3):
        ours, theirs = sent_after(secure, round_), sent_after(plain, round_)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            # The first round's gap is the quantisation's; training then makes it larger.
            room = 4 / steps_of(3) if round_ == 0 else 1e-4
            assert (ours[key].double() - tensor.double()).abs().max() < room
    assert trained(secure, 2) == dict.fromkeys("abc")


def test_every_method_is_admitted_or_refused_with_a_reason(tmp_path: Path, model: Path) -> None:
    reasons = {}
    for name in METHODS:
        with contextlib.suppress(SettingsError):
            founded(tmp_path / name, model, **with_method(name, SECURE))
            continue
        with pytest.raises(SettingsError) as refused:
            founded(tmp_path / name, model, **with_method(name, SECURE))
        reasons[name] = str(refused.value)
    assert not reasons.keys() & set(ADMITTED)
    assert {"local", "fedlease", "fedalt_select", "flexlora", "flora"} <= reasons.keys()
    assert all("[privacy] secure_sum" in reason for reason in reasons.values())


def test_nothing_that_the_server_receives_tells_an_upload(tmp_path: Path, model: Path) -> None:
    place = founded(tmp_path, model, **SHORT, **SECURE)
    heard: dict[tuple[str, str], list[bytes]] = {}

    def listen(client_id: str, data: bytes) -> bytes:
        heard.setdefault((client_id, step_of(data)), []).append(data)
        return data

    place.go_on(listen)
    assert all(
        decode(Answer, data).upload is None
        for (_, step), answers in heard.items()
        for data in answers
        if not step
    )
    masked = [
        decode(SumAnswer, data).masked[MASKED].numpy().tobytes()
        for (_, step), answers in heard.items()
        for data in answers
        if step == "mask"
    ]
    assert len(masked) == 9
    for data in masked:
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
    for name in "abc":  # the test can fail: an upload itself is far from uniform
        member = place.member(name)
        method, init = member.agreement.settings.method, member.agreement.init
        client = client_of(method, init, member._states("own", 3), name)
        vector = torch.cat([tensor.flatten() for tensor in client.individual.values()])
        data = (vector.double() * steps_of(3)).round().to(torch.int32).numpy().tobytes()
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        assert chisquare(counts).pvalue < 1e-6


@pytest.mark.parametrize("method", ["fedalt", pytest.param("fedit", marks=pytest.mark.long)])
@pytest.mark.parametrize("step", ["share", "mask", "unmask"])
def test_a_client_that_vanishes_at_any_step_costs_nobody_the_round(
    tmp_path: Path, model: Path, step: str, method: str
) -> None:
    sections = with_method(method, SECURE)
    place = founded(tmp_path / "secure", model, FOUR, **sections)
    plain = founded(tmp_path / "plain", model, FOUR, **with_method(method, {}))
    hurry(place, 0.5)
    gone = step != "unmask"  # whoever vanishes then is in the sum

    def vanish(client_id: str, data: bytes) -> bytes | Lost:
        away = client_id == "d" and step_of(data) == step and first(place, data)
        return Lost("it was away") if away else data

    def lose(client_id: str, data: bytes) -> bytes | Lost:
        try:
            answer = decode(Answer, data)
        except CodecError:
            return data
        away = client_id == "d" and answer.round == 1 and answer.upload is not None
        return encode(replace(answer, call="another")) if away and gone else data

    place.go_on(vanish)
    plain.go_on(lose)
    assert trained(place, 1).keys() == set(FOUR)
    assert (trained(place, 1)["d"] is not None) == gone
    ours, theirs = sent_after(place, 1), sent_after(plain, 1)
    for key, tensor in theirs.items():
        assert (ours[key].double() - tensor.double()).abs().max() < 1e-4
    assert trained(place, 2) == dict.fromkeys(FOUR)


def first(place: Federation, data: bytes) -> bool:
    return decode(SumAnswer, data).round == 1


@pytest.mark.parametrize(
    "step", ["mask", *(pytest.param(step, marks=pytest.mark.long) for step in ("share", "unmask"))]
)
def test_too_few_at_any_step_are_a_refused_round_and_the_next_one_is_right(
    tmp_path: Path, model: Path, step: str
) -> None:
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE)
    hurry(place, 0.5)

    def vanish(client_id: str, data: bytes) -> bytes | Lost:
        away = client_id in "cd" and step_of(data) == step and first(place, data)
        return Lost("it was away") if away else data

    place.go_on(vanish)
    assert trained(place, 0) == dict.fromkeys(FOUR)
    assert all("are needed" in (why or "") for why in trained(place, 1).values())
    before, after = sent_after(place, 0), sent_after(place, 1)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trained(place, 2) == dict.fromkeys(FOUR)


@pytest.mark.parametrize(
    "at", [5, 8, 11, *(pytest.param(at, marks=pytest.mark.long) for at in (2, 4, 7, 12))]
)
def test_killed_at_any_answer_it_goes_on_with_the_same_bits(
    tmp_path: Path, model: Path, at: int
) -> None:
    calm = founded(tmp_path / "calm", model, **SHORT, **SECURE)
    calm.go_on()
    place = founded(tmp_path / "killed", model, **SHORT, **SECURE)
    heard = 0

    def kill(client_id: str, data: bytes) -> bytes:
        nonlocal heard
        heard += 1
        if heard == at:
            raise Stopped
        return data

    place.go_on(kill)
    place.go_on()
    assert scores_without_bytes(place) == scores_without_bytes(calm)
    for name in "abc":
        ours, theirs = (states(root.client(name) / "state") for root in (place, calm))
        assert ours == theirs
    assert adapters_of(place.run) == adapters_of(calm.run)


def states(folder: Path) -> dict[str, str]:
    """The digests of a client's states, without its secrets, which differ each time."""
    return {
        path: digest for path, digest in adapters_of(folder).items() if not path.startswith("sum.")
    }


def scores_without_bytes(place: Federation) -> list[dict[str, Any]]:
    """What a server records, but for the bytes of calls that were sent twice."""
    return [
        {key: value for key, value in line.items() if not key.endswith("_bytes")}
        for line in scores_of(place.run)
    ]


def test_who_was_in_no_round_but_is_in_the_total_is_sent_the_whole_message(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE, traffic={"download": "int8"})
    hurry(place, 0.5)
    calls = listened(monkeypatch, "d")

    def lose(client_id: str, data: bytes) -> bytes | Lost:
        away = client_id == "d" and not is_step(data) and decode(Answer, data).round == 1
        return Lost("it was away") if away else data

    place.go_on(lose)
    sent = {call.round: type(call.message) for call in calls}
    assert sent[1] is Change
    assert sent[2] is Message


def test_killed_within_a_sum_it_knows_who_was_sent_the_whole_message(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = founded(tmp_path, model, **SHORT, **SECURE, traffic={"download": "int8"})

    def forget(client: Any, call: Call) -> None:
        folder = client.folder / "server" / "broadcast"
        if call.round == 2 and isinstance(call.message, Change):
            shutil.rmtree(folder)
            client.accepted.kept.digests.forget_below(folder)

    calls = listened(monkeypatch, "b", forget)

    def kill(client_id: str, data: bytes) -> bytes:
        if step_of(data) == "share" and decode(SumAnswer, data).round == 2:
            raise Stopped
        return data

    place.go_on(kill)
    place.go_on()
    assert [type(call.message) for call in calls if call.round == 2] == [Change, Message]
    assert trained(place, 2) == dict.fromkeys("abc")


def listened(
    monkeypatch: pytest.MonkeyPatch, name: str, see: Callable[[Any, Call], None] | None = None
) -> list[Call]:
    """The calls that a client will have got; `see` may look at it before it answers one."""
    told, calls = Client.answer, list[Call]()

    def listen(self: Any, data: bytes) -> bytes:
        with contextlib.suppress(CodecError):
            if self.client_id == name:
                calls.append(decode(Call, data))
                if see is not None:
                    see(self, calls[-1])
        return told(self, data)

    monkeypatch.setattr(Client, "answer", listen)
    return calls


def answers_to(place: Federation, name: str, *calls: SumCall) -> list[SumAnswer]:
    """What a client says to calls that no honest server sends."""
    member = place.member(name)
    return [decode(SumAnswer, member.answer(encode(call))) for call in calls]


def halted(tmp_path: Path, model: Path, step: str) -> tuple[Federation, dict[str, SumCall]]:
    """A federation that stopped when client a had answered a step of round 0, and its calls."""
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE)
    calls: dict[str, SumCall] = {}

    told = secure_client.SecureClient.answer

    def listen(self: Any, call: SumCall, data: bytes) -> bytes:
        if self.client_id == "a":
            calls[call.step] = call
        return told(self, call, data)

    def stop(client_id: str, data: bytes) -> bytes:
        if client_id == "a" and step_of(data) == step:
            raise Stopped
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secure_client.SecureClient, "answer", listen)
        place.go_on(stop)
    return place, calls


def test_a_client_answers_no_step_twice_to_different_calls(tmp_path: Path, model: Path) -> None:
    place, calls = halted(tmp_path, model, "unmask")
    again, other = answers_to(
        place, "a", calls["unmask"], replace(calls["unmask"], present=("a", "b", "c"))
    )
    assert again.seeds.keys() == set(FOUR)
    assert "was answered already, to another call" in other.error
    assert not other.seeds
    assert not other.keys


def test_a_client_trains_for_no_sum_twice(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the sum of four without the sum of three would be what the fourth has uploaded."""
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE)
    calls = listened(monkeypatch, "a")

    def stop(client_id: str, data: bytes) -> bytes:
        if client_id == "a" and step_of(data) == "share":
            raise Stopped
        return data

    place.go_on(stop)
    member, call = place.member("a"), calls[0]
    before = states(member.folder)
    unlike = replace(call, message=replace(call.message, facts={"other": 1}))
    answer = decode(Answer, member.answer(encode(unlike)))
    assert "it does not train for that sum again" in answer.error
    assert answer.keys is None
    assert states(member.folder) == before
    again = decode(Answer, member.answer(encode(call)))  # an honest server asks in the same words
    assert again.keys is not None


def test_a_server_that_forgot_whom_it_had_asked_refuses_the_round_and_goes_on(
    tmp_path: Path, model: Path
) -> None:
    place, _ = halted(tmp_path, model, "unmask")
    shutil.rmtree(place.run / "incoming")
    hurry(place, 0.5)

    def lose(client_id: str, data: bytes) -> bytes | Lost:
        away = client_id == "d" and not is_step(data) and decode(Answer, data).round == 0
        return Lost("it was away") if away else data

    place.go_on(lose)
    told = trained(place, 0)
    assert told.keys() == {"a", "b", "c"}  # they will not share with others than before
    assert all("only 0 clients have answered" in (why or "") for why in told.values())
    assert trained(place, 2) == dict.fromkeys(FOUR)


def test_a_server_cannot_put_its_own_key_in_a_peers_place(tmp_path: Path, model: Path) -> None:
    place, calls = halted(tmp_path, model, "unmask")
    keys = calls["share"].keys
    theirs = replace(keys["b"], mask=keys["c"].mask)
    forged = replace(calls["share"], keys={**keys, "b": theirs})
    stranger = replace(calls["share"], keys={**keys, "x": theirs})
    few = replace(calls["share"], keys={name: keys[name] for name in "ab"})
    member = place.member("a")
    session = member.folder / "sum.safetensors"
    # As if it had not been answered: only so the check itself is reached.
    begun = read(Session, session)
    write(session, replace(begun, answered={"train": begun.answered["train"]}))
    told = answers_to(place, "a", forged, stranger, few)
    assert "'b' is said to have sent are not signed by the key in peers/b.pub" in told[0].error
    assert "'x' is among those that have trained" in told[1].error
    assert "only 2 clients have trained, but 3 are needed" in told[2].error
    assert not any(answer.sealed for answer in told)


def blinded(monkeypatch: pytest.MonkeyPatch, names: str, spoil: Callable[[Call], Call]) -> None:
    """Let clients get other calls of round 1 than the server says that it has sent."""
    told = Client.answer

    def listen(self: Any, data: bytes) -> bytes:
        with contextlib.suppress(CodecError):
            call = decode(Call, data)
            if self.client_id in names and call.round == 1:
                answer = decode(Answer, told(self, encode(spoil(call))))
                return encode(replace(answer, call=digest(data)))
        return told(self, data)

    monkeypatch.setattr(Client, "answer", listen)


def zeros(call: Call) -> Call:
    message = whole(call.message)
    tree = {name: torch.zeros_like(tensor) for name, tensor in message.tree.items()}
    return replace(call, message=replace(message, tree=tree))


def drowned(call: Call) -> Call:
    message = whole(call.message)
    return replace(call, message=replace(message, facts={**message.facts, "weight": 1e-9}))


@pytest.mark.parametrize(("spoil", "method"), [(zeros, "fedit"), (drowned, "fedalt")])
def test_a_server_that_sends_others_zeros_gets_no_sum(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Call], Call],
    method: str,
) -> None:
    """Trained on zeros, adapters stay zeros, and the sum would be what one client has uploaded."""
    place = founded(tmp_path, model, FOUR, **with_method(method, SECURE))
    hurry(place, 0.5)
    blinded(monkeypatch, "bcd", spoil)
    monkeypatch.setattr(answer_forms, "check_keys", lambda *_: None)  # it does not mind
    place.go_on()
    assert trained(place, 1).keys() == set(FOUR)
    assert all("only 0 clients have answered" in (why or "") for why in trained(place, 1).values())
    assert (
        "else it has trained on another broadcast"
        in (place.run.parent / "logs" / "server.log").read_text()
    )
    assert trained(place, 2) == dict.fromkeys(FOUR)


def test_who_has_trained_on_another_broadcast_is_not_in_the_sum(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = founded(tmp_path, model, FOUR, **with_method("fedit", SECURE))
    blinded(monkeypatch, "d", zeros)
    place.go_on()
    assert trained(place, 1) == dict.fromkeys("abc")
    assert trained(place, 2) == dict.fromkeys(FOUR)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"mask": "zz"}, "its key for masks is 'zz', expected 64 hexadecimal digits"),
        ({"share": "00" * 32}, "a key of the round is none"),
        pytest.param({"share": "ab" * 31}, "its key for shares is", marks=pytest.mark.long),
        pytest.param({"mask": "01" + "00" * 31}, "of the round is none", marks=pytest.mark.long),
    ],
)
def test_a_client_whose_keys_are_none_costs_nobody_the_sum(
    tmp_path: Path, model: Path, odd: dict[str, str], message: str
) -> None:
    place = founded(tmp_path, model, FOUR, **with_method("fedit", SECURE))
    hostile = place.member("d")
    agreement, secure = hostile.agreement, hostile.secure
    assert secure is not None
    broadcast = whole(called_first(place, hostile.client_id).message)

    def spoil(client_id: str, data: bytes) -> bytes:
        with contextlib.suppress(CodecError):
            answer = decode(Answer, data)
            if client_id == "d" and answer.keys is not None and answer.round == 0:
                keys = replace(answer.keys, **odd)
                about = agreement, "d", 0, keys, digest_of_sent(broadcast)
                signature = secure.signatures.sign(signed_of(*about)).hex()
                return encode(replace(answer, keys=replace(keys, signature=signature)))
        return data

    place.go_on(spoil)
    assert trained(place, 0) == dict.fromkeys("abc")
    assert re.search(message, (place.run / "refused.jsonl").read_text())
    assert trained(place, 2) == dict.fromkeys(FOUR)


def called_first(place: Federation, name: str) -> Call:
    """The first call that a client gets, in a copy of its federation."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        copy = Federation(shutil.copytree(place.root, Path(folder) / "copy"))
        calls = listened(patch, name)

        def stop(client_id: str, data: bytes) -> bytes:
            if calls:
                raise Stopped
            return data

        copy.go_on(stop)
    return calls[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": 1}, "it has not trained for the sum of round 2"),
        ({"client": "b"}, "the call is for client 'b'"),
        ({"federation": "others"}, "the call is for federation 'others'"),
        ({"terms": "0"}, "the call is for terms '0'"),
        ({"step": "unmask", "present": FOUR}, "nothing that could be unmasked"),
    ],
)
def test_a_call_of_no_honest_server_is_refused(
    tmp_path: Path, model: Path, change: dict[str, Any], message: str
) -> None:
    place, calls = halted(tmp_path, model, "share")
    (told,) = answers_to(place, "a", replace(calls["share"], **change))
    assert message in told.error


def test_an_answer_that_is_none_counts_as_no_answer(tmp_path: Path, model: Path) -> None:
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE)
    hurry(place, 0.5)

    def spoil(client_id: str, data: bytes) -> bytes:
        if client_id == "d" and step_of(data) == "mask" and first(place, data):
            answer = decode(SumAnswer, data)
            short = {MASKED: answer.masked[MASKED][:-1].clone()}
            return encode(replace(answer, masked=short))
        return data

    place.go_on(spoil)
    assert "too late for the sum" in (trained(place, 1)["d"] or "")
    assert trained(place, 1)["a"] is None


def test_masks_that_were_not_agreed_on_are_a_refused_round(tmp_path: Path, model: Path) -> None:
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE)

    def spoil(client_id: str, data: bytes) -> bytes:
        if client_id == "d" and step_of(data) == "mask" and first(place, data):
            answer = decode(SumAnswer, data)
            other = torch.randint_like(answer.masked[MASKED], -(2**31), 2**31 - 1)
            return encode(replace(answer, masked={MASKED: other}))
        return data

    place.go_on(spoil)
    assert all("out of range" in (why or "") for why in trained(place, 1).values())
    assert trained(place, 2) == dict.fromkeys(FOUR)


def test_shares_that_nobody_can_open_are_a_refused_round_and_named(
    tmp_path: Path, model: Path
) -> None:
    """Without a deadline, too: whoever cannot use them is not waited for."""
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE)

    def spoil(client_id: str, data: bytes) -> bytes:
        if client_id == "d" and step_of(data) == "share" and first(place, data):
            answer = decode(SumAnswer, data)
            return encode(replace(answer, sealed=dict.fromkeys(answer.sealed, "00" * 32)))
        return data

    place.go_on(spoil)
    assert all("the call to mask" in (why or "") for why in trained(place, 1).values())
    told = "round 2, mask: a: client 'a': the shares that 'd' has sent: a share was changed"
    assert told in (place.run.parent / "logs" / "server.log").read_text()
    assert trained(place, 2) == dict.fromkeys(FOUR)


def test_the_server_hears_of_an_upload_that_does_not_fit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = founded(tmp_path, model, **SHORT, **SECURE)
    monkeypatch.setattr(secure_sum, "RANGE", 1e-9)
    errors = []

    def listen(_: str, data: bytes) -> bytes:
        errors.append(decode(Answer, data).error)
        raise Stopped

    place.go_on(listen)
    assert "a secure sum has room for 1e-09" in errors[0]


def test_noise_for_clients_comes_on_top(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("dp_accounting")
    noisy = {"unit": "client", "noise": 0.5, "clip": 0.5, "seed": 1, "delta": 1e-5}
    sections = {**SHORT, "rounds": {**SHORT["rounds"], "select": "last"}}
    plain = founded(tmp_path / "plain", model, **sections, privacy=noisy)
    secure = founded(tmp_path / "secure", model, **sections, privacy={**noisy, "secure_sum": True})
    for place in (plain, secure):
        hurry(place, 60)
        place.go_on()
    for round_ in range(2):
        ours, theirs = sent_after(secure, round_), sent_after(plain, round_)
        for key, tensor in theirs.items():
            assert (ours[key].double() - tensor.double()).abs().max() < 1e-3


def test_a_round_for_which_there_is_no_budget_has_no_sum(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("dp_accounting")
    noisy = {"unit": "client", "epsilon": 8.0, "clip": 0.5, "seed": 1, "secure_sum": True}
    sections = {**SHORT, "rounds": {**SHORT["rounds"], "select": "last"}}
    place = founded(tmp_path, model, **sections, privacy=noisy)

    def stop(client_id: str, data: bytes) -> bytes:
        if step_of(data) == "share" and first(place, data):
            raise Stopped
        return data

    place.go_on(stop)
    place.go_on()
    assert [len(trained(place, round_)) for round_ in range(3)] == [3, 3, 0]
    assert (place.run.parent / "logs" / "server.log").read_text().count("nobody trains") == 1
    assert "no secure sum" not in (place.run.parent / "logs" / "server.log").read_text()


def test_what_makes_no_sense_beside_it_is_one_sentence(tmp_path: Path, model: Path) -> None:
    for number, (section, message) in enumerate(
        [
            ({"rounds": {"robust": "median"}, "method": {"name": "fedit"}}, "robust = 'median'"),
            ({"traffic": {"upload": "int8"}}, "masks leave nothing to shorten"),
            ({"firewall": {"norm_limit": 3.0}}, "norm_limit compares single uploads"),
            ({"method": {"weighting": "examples"}}, 'write weighting = "uniform"'),
            ({"rounds": {"participation": 0.5}}, "2 clients train in a round"),
        ]
    ):
        with pytest.raises(SettingsError, match=message.replace("(", "[(]")):
            founded(tmp_path / str(number), model, **{**SECURE, **section})
    place = founded(tmp_path / "place", model, **SHORT, **SECURE)
    config = read_server_config(place.config)
    with pytest.raises(SettingsError, match="nobody can be added"):
        add_clients(config, ["d"])
    with pytest.raises(SettingsError, match="does not know anyone's part"):
        remove_client(config, "a")
    for rule, message in (
        ("late = 'count'", "late = 'count' makes no sense"),
        ("buffer = 2", "buffer = 2 makes no sense"),
    ):
        text = place.config.read_text()
        place.config.write_text(text.replace("[rules]", f"[rules]\n{rule}"))
        with pytest.raises(SettingsError, match=message):
            place.go_on()
        place.config.write_text(text)


def test_a_run_on_one_machine_is_told_that_it_needs_none(tmp_path: Path, model: Path) -> None:
    place = founded(tmp_path, model, **SHORT, **SECURE)
    settings = read_server_config(place.config).terms.settings
    data = replace(settings.data, path=tmp_path / "all")
    with pytest.raises(SettingsError, match="there is nobody to hide an upload from"):
        start_run(prepare(replace(settings, data=data)), tmp_path / "run")


def test_a_new_key_counts_once_the_peers_have_it(tmp_path: Path, model: Path) -> None:
    place = founded(tmp_path, model, FOUR, **SHORT, **SECURE)
    config = read_server_config(place.config)
    rotate_key(config, "b")

    def lost(client_id: str, data: bytes) -> bytes:
        if client_id == "a" and is_step(data):
            error = decode(SumAnswer, data).error
            assert error.endswith("peers/b.pub is missing, or no public key")
            assert str(tmp_path) not in error
            raise Stopped
        return data

    def stop(client_id: str, data: bytes) -> bytes:
        answer = decode(SumAnswer, data) if step_of(data) or is_step(data) else None
        if answer is not None and answer.error:
            assert "not signed by the key in peers/b.pub; if it has a new one" in answer.error
            raise Stopped
        return data

    place.go_on(stop)
    (place.client("a") / "peers" / "b.pub").unlink()
    place.go_on(lost)
    new = config.place.clients / "b.pub"
    for name in FOUR:
        (place.client(name) / "peers" / "b.pub").write_bytes(new.read_bytes())
    place.go_on()
    assert trained(place, 2) == dict.fromkeys(FOUR)


def is_step(data: bytes) -> bool:
    try:
        decode(SumAnswer, data)
    except CodecError:
        return False
    return True


def test_a_full_disk_in_a_step_is_an_answer_and_the_step_is_asked_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = founded(tmp_path, model, **SHORT, **SECURE)
    write, errors = secure_client.atomic_write, list[SumAnswer]()

    def full(path: Path, data: bytes) -> None:
        if path.name == "sum-mask.bin" and "clients/b/" in path.as_posix() and not errors:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    def look(_: str, data: bytes) -> bytes:
        with contextlib.suppress(CodecError):
            if (answer := decode(SumAnswer, data)).error:
                errors.append(answer)
        return data

    monkeypatch.setattr(secure_client, "atomic_write", full)
    monkeypatch.setattr(secure_calls, "_REST", 0.0)
    place.go_on(look)
    (error,) = errors
    assert "OSError; what it prints says more" in error.error
    assert not error.masked  # what could not be kept was not sent
    assert trained(place, 0) == dict.fromkeys(("a", "b", "c"))


def test_who_follows_a_restored_server_trains_again_for_the_last_sum_it_was_in(
    tmp_path: Path, model: Path
) -> None:
    about = {"rounds": {"rounds": 4, "test": False, "participation": 0.75}}
    place = founded(tmp_path, model, FOUR, **about, **SECURE)
    settings = read_server_config(place.config).terms.settings
    drawn = [settings.rounds.cohort(FOUR, at, settings.seed) for at in range(4)]
    at = next(at for at in (1, 2) if set(drawn[at]) - set(drawn[at + 1]))

    def stopped_after(round_: int, answers: int) -> Callable[[str, bytes], bytes]:
        def look(_: str, data: bytes) -> bytes:
            nonlocal answers
            answers -= round_of(data) == round_
            if not answers:
                raise Stopped
            return data

        return look

    place.go_on(stopped_after(at, 1))
    backup = tmp_path / "server.tar"
    assert run_command("federation", "backup", place.config, backup) == 0
    place.go_on(stopped_after(at + 1, len(FOUR)))
    place.server_name = "elsewhere"
    assert run_command("federation", "restore", backup, place.config.parent) == 0
    place.go_on(go_back=True)
    assert trained(place, at) == dict.fromkeys(drawn[at])
    assert trained(place, 3) == dict.fromkeys(drawn[3])


def test_nobody_is_taken_out_of_a_sum_by_hand(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = halted(tmp_path, model, "share")
    assert run_command("leave", place.run, "--client", "d") == 2
    assert "'d' cannot be taken out: with [privacy] secure_sum" in capsys.readouterr().err


def test_status_shows_whom_a_step_waits_for(tmp_path: Path, model: Path) -> None:
    place = founded(tmp_path, model, **SHORT, **SECURE)
    shown: list[dict[str, Any]] = []

    def lose(client_id: str, data: bytes) -> bytes | Lost:
        if client_id == "b" and step_of(data) == "mask":
            shown.append(json.loads((place.run / "status.json").read_text()))
            return Lost("it was away") if len(shown) == 1 else data
        return data

    place.go_on(lose)
    assert shown[1]["awaited"] == ["b"]
    assert shown[1]["heard"].keys() == {"a", "b", "c"}


def test_a_step_that_did_without_a_client_is_not_told_as_late(tmp_path: Path, model: Path) -> None:
    place, told = founded(tmp_path, model, **SHORT, **SECURE), list[str]()
    host = replace(server_from(read_server_config(place.config), Wire({})), say=told.append)
    step = Asked("c", 0, NEVER, "digest", (), {}, "validation")
    collector = host._collector(1, {"c": [step, replace(step, trains=("own",))]})
    collector._take("c", b"an answer to the last step of round 1")
    assert told == []
    collector._take("c", b"keys for round 1")
    assert "came after that round had ended" in told[0]
