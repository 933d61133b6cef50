"""Bytes become a Flower message and come back; what calls have in common is one record."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedalt.core.codec import encode
from fedalt.core.tree import Name, Tree
from fedalt.flower import message_content
from fedalt.flower.message_content import bytes_of, content_of


@dataclass(frozen=True)
class Note:
    TAG: ClassVar = "note"

    to: str
    tree: Tree


def note(to: str) -> bytes:
    return encode(Note(to, {Name("q", "individual", "A"): torch.arange(50_000.0)}))


@pytest.mark.parametrize("data", [b"", b"short", bytes(range(256)) * 1000, note("a")])
def test_bytes_come_back(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(message_content, "CHUNK", 100_000)
    assert bytes_of(content_of(data)) == data


def test_of_two_calls_with_the_same_tensors_only_the_heads_are_different_records() -> None:
    first, second = (
        {name: each.object_id for name, each in content_of(note(to)).items()} for to in ("a", "bb")
    )
    assert len(first) == 2
    assert [first[name] == second[name] for name in sorted(first)] == [False, True]


@pytest.mark.parametrize("most", [0, 5, 150_000, 199_999])
def test_of_more_than_the_most_one_byte_too_many_comes(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(message_content, "CHUNK", 50_000)
    data = bytes(200_000)
    assert bytes_of(content_of(data), most) == data[: most + 1]
    assert bytes_of(content_of(data), len(data)) == data


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"x": ArrayRecord()}),
        RecordDict({"x": ConfigRecord({"fedalt": "text"})}),
        RecordDict({"x": ConfigRecord({"other": b""})}),
    ],
)
def test_a_record_that_is_not_ours_is_named(content: RecordDict) -> None:
    with pytest.raises(ValueError, match="expected pieces called 'fedalt', got a record 'x'"):
        bytes_of(content)
