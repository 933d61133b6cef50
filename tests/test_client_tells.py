"""What a federation's client prints for its owner: each round, and whatever hinders it."""

import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from federations import Federation, founded
from runs_for_tests import save_model

from fedalt.core.codec import decode, encode
from fedalt.federation import client as member
from fedalt.federation.messages import Answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def made(tmp_path: Path, model: Path) -> Federation:
    return founded(tmp_path, model, rounds={"rounds": 3, "evaluate_every": 3, "test": False})


def test_each_round_is_a_line_with_steps_loss_and_bytes(made: Federation) -> None:
    made.go_on()
    told = made.said["a"]
    for round_, line in enumerate(told[:3], 1):
        assert re.fullmatch(
            rf"round {round_}/3: trained 3 steps, loss \d\.\d+, sent [\d.]+ kB", line
        )
    assert re.match(r"after round 3/3: scored own of round 3 on validation data: loss", told[3])


def test_what_there_is_to_know_of_its_data_is_told_first(made: Federation) -> None:
    (made.client("a") / "data" / "a.test.jsonl").unlink()
    made.member("a")
    assert made.said["a"] == ["note: trained but not scored, without test data: a"]


def test_an_upload_that_was_refused_is_told_with_the_next_call(made: Federation) -> None:
    def spoil(client_id: str, answer: bytes) -> bytes:
        whole = decode(Answer, answer)
        if client_id != "b" or whole.round != 1 or whole.upload is None:
            return answer
        tree = {name: torch.full_like(each, torch.nan) for name, each in whole.upload.tree.items()}
        return encode(replace(whole, upload=replace(whole.upload, tree=tree)))

    made.go_on(spoil)
    (line,) = [text for text in made.said["b"] if "rejected" in text]
    assert line.startswith("round 3/3: the server rejected the upload of round 2, ")
    assert "goes on from round 1" in line
    assert not any("rejected" in text for text in made.said["a"])


def calls_of(made: Federation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a federation of which client a is in trouble end, and what a has said."""
    monkeypatch.setattr("fedalt.federation.round_collector._REST", 0.0)
    made.go_on()
    return made.said["a"]


def test_a_full_disk_is_told_with_its_file(
    made: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, left = member.atomic_write, [2]

    def full(path: Path, data: bytes) -> None:
        if path.name == "answer.bin" and "clients/a/" in str(path) and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(path, data)

    monkeypatch.setattr(member, "atomic_write", full)
    told = [each for each in calls_of(made, monkeypatch) if "No space left" in each]
    assert len(told) == 2
    assert told[0].startswith("round 1/3: this client could not answer: ")
    assert "answer.bin" in told[0]


def test_damage_is_told_with_its_file_and_not_hidden(made: Federation) -> None:
    file = made.client("a") / "state" / "clients" / "a" / "0000.safetensors"

    def spoil(client_id: str, answer: bytes) -> bytes:
        if client_id == "c" and decode(Answer, answer).round == 0:
            file.write_text("nonsense")
        if client_id == "a" and decode(Answer, answer).error:
            raise KeyboardInterrupt
        return answer

    with pytest.raises(KeyboardInterrupt):
        made.go_on(spoil)
    last = made.said["a"][-1]
    assert last.startswith("round 2/3: this client could not answer: ")
    assert file.name in last


@pytest.mark.parametrize("name", ["run.json", "accepted.json"])
def test_what_holds_a_federation_together_is_damaged_with_one_sentence(
    made: Federation, name: str
) -> None:
    made.go_on()
    file = made.client("a") / "state" / name
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            made.member("a")
