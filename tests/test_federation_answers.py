"""What a federation's server makes of scores, costs and errors, of late and of breaking answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_for_tests import save_model, scores_of
from test_federation import CLIENTS, Place, Wire, filled, place, spoilt, states_of

from fedalt.core.codec import decode, encode
from fedalt.engine.blame import MethodFailed
from fedalt.engine.robust import central_loss
from fedalt.federation.call_checks import told_outside
from fedalt.federation.messages import Answer, Cost, Score
from fedalt.federation.transport import Lost
from fedalt.methods.fedalt import FedALT
from fedalt.runs.folder import RunFolder
from fedalt.runs.quarantine import refusals
from fedalt.training.group import TrainingError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def scored(answer: Answer, **changes: Any) -> Answer:
    return replace(answer, scores=tuple(replace(each, **changes) for each in answer.scores))


def cost(answer: Answer, **changes: Any) -> Answer:
    return replace(answer, costs=tuple(replace(each, **changes) for each in answer.costs))


def counting(answer: Answer, **counts: float | None) -> Answer:
    """The answer with other counts of trained numbers for its own column; None: without one."""
    own, *others = answer.costs
    names = {f"trained individual {factor}": count for factor, count in counts.items()}
    metrics = {**own.metrics, **names}
    kept = {name: number for name, number in metrics.items() if number is not None}
    return replace(answer, costs=(replace(own, metrics=kept), *others))


UNASKED = (Score("own", "validation", 0, {"loss": 1.0}),)
BAD: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "no loss": (lambda a: scored(a, metrics={}), "has no 'loss'"),
    "a loss below 0": (lambda a: scored(a, metrics={"loss": -1e6}), "loss is -1000000.0"),
    "a loss beyond sums": (lambda a: scored(a, metrics={"loss": 1e308}), "loss is 1e+308"),
    "a round to come": (lambda a: scored(a, round=999_999), "is of round 1000000, expected 1"),
    "a metric too many": (lambda a: scored(a, metrics={"loss": 1, "x": 1}), "unknown metric 'x'"),
    "the test data": (lambda a: scored(a, split="test"), "is of the test data"),
    "another column": (lambda a: scored(a, column="other"), "column 'other' was not asked for"),
    "half the scores": (lambda a: replace(a, scores=a.scores[:1]), "column 'local' is missing"),
    "scores twice": (lambda a: replace(a, scores=a.scores * 2), "twice"),
    "no costs": (lambda a: replace(a, costs=()), "the cost of column 'local' is missing"),
    "costs twice": (lambda a: replace(a, costs=a.costs * 2), "twice"),
    "seconds below 0": (lambda a: cost(a, seconds=-1.0), "seconds is -1.0"),
    "half a step": (
        lambda a: cost(a, metrics={**a.costs[0].metrics, "steps": 0.5}),
        "steps is 0.5, expected a whole number",
    ),
    "a budget that it does not keep": (
        lambda a: cost(a, metrics={**a.costs[0].metrics, "epsilon": 1e9}),
        "unknown metric 'epsilon'",
    ),
    "a clip that there is not": (
        lambda a: cost(a, metrics={**a.costs[0].metrics, "within_clip": 1.0}),
        "unknown metric 'within_clip'",
    ),
    "a count too few": (lambda a: counting(a, A=None), "trained numbers, expected"),
    "another count": (lambda a: counting(a, B=1.0), "trained numbers, expected"),
    "a count too many": (lambda a: counting(a, C=1.0), "trained numbers, expected"),
    "an error and an upload": (lambda a: replace(a, error="no memory"), "something beside it"),
    "a book of an error": (
        lambda a: replace(a, upload=None, scores=(), costs=(), error="x" * 10_000),
        "expected at most 600 printable",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_answer_outside_the_schema_counts_in_nothing(
    tmp_path: Path, model: Path, kind: str
) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 2, "test": False})
    change, says = BAD[kind]

    def spoil(client_id: str, data: bytes) -> bytes | Lost:
        answer = decode(Answer, data)
        ours = (client_id, answer.round) == ("b", 1)
        return encode(change(answer)) if ours else data

    there.host(Wire(there.members(), spoil)).to_the_end()
    (refusal,) = refusals(tmp_path / "server")
    assert (refusal["round"], refusal["client"]) == (1, "b")
    assert says in refusal["reason"]
    lines = scores_of(tmp_path / "server")
    assert {line["client"] for line in lines if line["kind"] == "score" and line["round"] == 0} == {
        "a",
        "c",
    }
    assert ("train", 1, "b") not in {
        (line["kind"], line["round"], line.get("client")) for line in lines
    }


def test_scores_that_nobody_asked_for_are_refused(tmp_path: Path, model: Path) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 1, "test": False})

    def spoil(client_id: str, data: bytes) -> bytes | Lost:
        answer = decode(Answer, data)
        ours = client_id == "b" and answer.upload is not None
        return encode(replace(answer, scores=UNASKED)) if ours else data

    there.host(Wire(there.members(), spoil)).to_the_end()
    assert "was not asked for" in refusals(tmp_path / "server")[0]["reason"]


def test_bytes_on_disk_that_are_no_answer_are_dropped_at_a_restart(
    tmp_path: Path, model: Path
) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 1, "test": False})
    wire = Wire(there.members())
    told: list[str] = []

    host = replace(there.host(wire), say=told.append)
    folder = tmp_path / "server" / "incoming" / "0000"
    folder.mkdir(parents=True)
    honest = next(iter(_answers_of(tmp_path / "calm", model).values()))
    bad = replace(decode(Answer, honest), costs=(Cost("own", {}, 0.0),))
    (folder / "a.bin").write_bytes(encode(bad))
    (folder / "b.bin").write_bytes(b"rubbish")
    (after := folder.with_name("0001")).mkdir()
    (after / "c.bin").write_bytes(b"rubbish")
    host.to_the_end()
    dropped = [text.partition(" is dropped: ")[0] for text in told if "is dropped: " in text]
    assert dropped == [
        "round 1: a: its answer on disk",
        "round 1: b: its answer on disk",
        "after round 1: c: its answer on disk",
    ]
    trained = {line["client"] for line in scores_of(tmp_path / "server") if line["kind"] == "train"}
    assert trained == set(CLIENTS)


def _answers_of(root: Path, model: Path) -> dict[str, bytes]:
    root.mkdir()
    calm, _ = place(root, model, rounds={"rounds": 1, "test": False})
    wire = Wire(calm.members())
    calm.host(wire).to_the_end()
    return {decode(Answer, each).client: each for each in reversed(wire.answered)}


def late_wire(there: Place) -> Wire:
    """A wire on which b's first answer comes in the next round."""
    kept: list[tuple[str, bytes | Lost]] = []

    class Slow(Wire):
        def receive(self) -> Sequence[tuple[str, bytes | Lost]]:
            came = list(super().receive())
            slow = [each for each in came if _is_of(each, "b", 0)]
            if kept and any(_is_of(each, "a", 1) for each in came):
                return [kept.pop(), *came]
            kept.extend(slow)
            return [each for each in came if each not in slow]

    return Slow(there.members())


def _is_of(came: tuple[str, bytes | Lost], client_id: str, round_: int) -> bool:
    client, data = came
    return client == client_id and isinstance(data, bytes) and decode(Answer, data).round == round_


@pytest.mark.parametrize("late", ["count", "drop"])
def test_a_late_answer_is_no_refused_one(tmp_path: Path, model: Path, late: str) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 2, "test": False})
    told: list[str] = []
    host = there.host(late_wire(there), deadline=1e-3, late=late)
    replace(host, say=told.append).to_the_end()
    assert refusals(tmp_path / "server") == []
    assert not (tmp_path / "server" / "quarantine").exists()
    (text,) = [each for each in told if "late" in each]
    assert ("counts in this one" if late == "count" else "it is dropped") in text
    lines = scores_of(tmp_path / "server")
    own = [line for line in lines if line["kind"] == "train" and line["column"] == "own"]
    assert [(line["round"], line["trained"]) for line in own if line["client"] == "b"] == [
        (1, 0) if late == "count" else (1, 1)
    ]


def test_a_late_upload_of_another_form_than_this_rounds_is_no_refused_one(
    tmp_path: Path, model: Path
) -> None:
    sections = {"rounds": {"rounds": 2, "test": False}, "method": {"name": "rolora"}}
    there, _ = place(tmp_path, model, **sections)
    told: list[str] = []
    host = there.host(late_wire(there), deadline=1e-3, late="count")
    replace(host, say=told.append).to_the_end()
    assert refusals(tmp_path / "server") == []
    (text,) = [each for each in told if "late" in each]
    assert "b: late: its upload of round 1 is not of the form of this one's: " in text
    assert text.endswith("; it is dropped")


def test_one_client_does_not_choose_the_tested_round(tmp_path: Path, model: Path) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 4, "test": False})

    def spoil(client_id: str, data: bytes) -> bytes | Lost:
        answer = decode(Answer, data)
        if client_id != "b" or not answer.scores:
            return data
        loss = 0.0 if answer.scores[0].round == 0 else 1e9
        return encode(scored(answer, metrics={"loss": loss}))

    there.host(Wire(there.members(), spoil)).to_the_end()
    assert refusals(tmp_path / "server") == []
    lines = [line for line in scores_of(tmp_path / "server") if line["kind"] == "score"]
    for column, (round_, _) in RunFolder(tmp_path / "server").progress().best.items():
        honest = {
            at: [x["metrics"]["loss"] for x in lines if (x["column"], x["round"]) == (column, at)]
            for at in range(4)
        }
        assert round_ == min(honest, key=lambda at: sorted(honest[at])[1])
        assert round_ != 0


def test_the_central_loss_leaves_out_both_ends_from_three_clients_on() -> None:
    assert central_loss([2.0]) == 2.0
    assert central_loss([1.0, 3.0]) == 2.0
    assert central_loss([-1e6, 3.0, 5.0]) == 3.0
    assert central_loss([1e9, 3.0, 5.0, float("nan")]) == (5.0 + 1e9) / 2
    assert central_loss([0.0, *[4.0] * 18, 1e9]) == 4.0
    assert central_loss([0.0, 0.0, *[4.0] * 17, 1e9, 1e9]) == 4.0  # a tenth of 21, rounded up


def test_an_upload_that_breaks_the_method_is_found_and_left_out(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, dict[str, Any]] = {"rounds": {"rounds": 2, "test": False}}
    for each in ("bad", "without"):
        (tmp_path / each).mkdir()
    bad, settings = place(tmp_path / "bad", model, **sections)
    without, _ = place(tmp_path / "without", model, **sections)
    aggregate = FedALT.aggregate

    def fragile(self: Any, server: Any, replies: Any) -> Any:
        def looked() -> Any:
            for client_id, upload in replies:
                if upload.facts["weight"] == 1 and any(
                    (each == 0.125).all() for each in upload.tree.values()
                ):
                    raise torch.linalg.LinAlgError("the algorithm failed to converge")
                yield client_id, upload

        return aggregate(self, server, looked())

    def spoil(client_id: str, data: bytes) -> bytes | Lost:
        answer = decode(Answer, data)
        ours = client_id == "b" and answer.upload is not None and answer.round == 1
        return spoilt(data, filled(0.125)) if ours else data

    def lose(client_id: str, data: bytes) -> bytes | Lost:
        ours = client_id == "b" and decode(Answer, data).round == 1
        return Lost("for the test") if ours else data

    monkeypatch.setattr(FedALT, "aggregate", fragile)
    bad.host(Wire(bad.members(), spoil)).to_the_end()
    without.host(Wire(without.members(), lose), deadline=1e-3).to_the_end()
    (refusal,) = refusals(bad.root / "server")
    assert (refusal["client"], refusal["round"]) == ("b", 1)
    assert "the method cannot aggregate it: _LinAlgError: the algorithm" in refusal["reason"]
    for each in CLIENTS:
        mine = states_of(bad.root / f"state-{each}", each, settings.method.client_state)
        theirs = states_of(without.root / f"state-{each}", each, settings.method.client_state)
        assert mine[0] == theirs[0]
        assert encode(mine[1]) == encode(theirs[1])


def test_who_makes_the_state_infinite_is_left_out(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 1, "test": False})
    aggregate = FedALT.aggregate

    def overflowing(self: Any, server: Any, replies: Any) -> Any:
        after = aggregate(self, server, replies)
        if any(float(each.max()) > 1e29 for each in after.total.values()):
            inf = {name: each * float("inf") for name, each in after.total.items()}
            return replace(after, total=inf)
        return after

    def spoil(client_id: str, data: bytes) -> bytes | Lost:
        ours = client_id == "b" and decode(Answer, data).upload is not None
        return spoilt(data, filled(1e30)) if ours else data

    monkeypatch.setattr(FedALT, "aggregate", overflowing)
    there.host(Wire(there.members(), spoil)).to_the_end()
    (refusal,) = refusals(tmp_path / "server")
    assert refusal["client"] == "b"
    assert "has NaN or infinity" in refusal["reason"]


def test_a_method_that_always_fails_is_told_as_the_methods_fault(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, _ = place(tmp_path, model, rounds={"rounds": 1, "test": False})

    def broken(self: Any, server: Any, replies: Any) -> Any:
        raise KeyError(len(list(replies)))

    monkeypatch.setattr(FedALT, "aggregate", broken)
    with pytest.raises(MethodFailed, match=r"FedALT cannot aggregate .* no client can be blamed"):
        there.host(Wire(there.members())).to_the_end()
    assert refusals(tmp_path / "server") == []


def test_errors_tell_the_server_no_paths() -> None:
    place = Path("/home/anna/My Patients/state")
    texts = {
        PermissionError(13, "Permission denied", str(place / "x")): "client 'a': Permission denied",
        KeyError("Mrs Miller, born 1954"): "client 'a': KeyError; what it prints itself says more",
    }
    for error, told in texts.items():
        assert told_outside(error, "a", [place]) == told
    error = IsADirectoryError(21, "Is a directory", str(place / "served.json"))
    assert told_outside(error, "a", [place]) == "client 'a': Is a directory"
    named = told_outside(error, "a", [place], state=place)
    assert named == "client 'a': Is a directory: served.json"
    for path in (f"{place}/a.bin", "/etc/passwd", "~/data/x", r"C:\Users\anna\x", r"\\host\x"):
        told = told_outside(TrainingError(f"cannot use {path}: no"), "a", [place])
        assert told == "cannot use (a path): no", told
    assert (
        told_outside(TrainingError("individual/A/block.0.q"), "a", []) == "individual/A/block.0.q"
    )
