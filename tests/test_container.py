"""No change to a file goes unnoticed, and the safetensors library reads what is written."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fedalt.core.codec import CodecError, decode, encode
from fedalt.core.container import MAX_HEADER, pack, sealed, unpack
from fedalt.core.header import head_length
from fedalt.core.tree import Name
from fedalt.methods.contract import Message

MESSAGE = Message(
    {
        Name("layers.0.q", "individual", "A"): torch.tensor([[1.0, -2.0, 0.5]]),
        Name("layers.0.q", "individual", "B"): torch.zeros(2, 1, dtype=torch.float64),
        Name("layers.0/q", "mixer", "G"): torch.tensor([3, 4, 5], dtype=torch.int8),
    },
    {"weight": 1.5, "clients": 2, "name": "é"},
)
DATA = encode(MESSAGE)
HEAD = head_length(DATA)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(DATA)
    with safe_open(tmp_path / "state", "pt") as file:
        assert set(file.keys()) == {f"tree/{name}" for name in MESSAGE.tree}
        assert file.metadata().keys() == {"fedalt"}
        for name, tensor in MESSAGE.tree.items():
            assert torch.equal(file.get_tensor(f"tree/{name}"), tensor)


def test_the_library_reads_a_file_without_tensors() -> None:
    assert safetensors.torch.load(encode(Message({}))) == {}


def test_every_truncation_is_refused() -> None:
    for length in range(len(DATA)):
        with pytest.raises(CodecError, match=r"^truncated"):
            decode(Message, DATA[:length])


def test_trailing_bytes_are_refused() -> None:
    for more in (b"\0", b" ", DATA):
        with pytest.raises(CodecError, match=r"^trailing bytes"):
            decode(Message, DATA + more)


def test_every_flipped_bit_is_refused() -> None:
    for place in range(len(DATA)):
        for bit in range(8):
            changed = bytearray(DATA)
            changed[place] ^= 1 << bit
            with pytest.raises(CodecError):
                decode(Message, bytes(changed))


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.randrange(256)


def insert(data: bytearray, chance: random.Random) -> None:
    place = chance.randint(0, len(data))
    data[place:place] = chance.choice([b" ", b"\0", b'"', b",", chance.randbytes(5)])


def delete(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data))
    del data[place : place + chance.randint(1, 9)]


def swap(data: bytearray, chance: random.Random) -> None:
    size = chance.choice([1, 4, 8])
    one, two = sorted(chance.sample(range(0, len(data) - size, size), 2))
    data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]


def repeat(data: bytearray, chance: random.Random) -> None:
    one, two = sorted(chance.sample(range(len(data)), 2))
    data[two:two] = data[one:two]


@pytest.mark.parametrize("corrupt", [flip, insert, delete, swap, repeat])
def test_random_corruption_is_refused(corrupt: Callable[[bytearray, random.Random], None]) -> None:
    chance = random.Random(0)
    changed = 0
    for _ in range(1000):
        data = bytearray(DATA)
        corrupt(data, chance)
        if bytes(data) != DATA:
            changed += 1
            with pytest.raises(CodecError):
                decode(Message, bytes(data))
    assert changed > 900


def test_what_is_no_file_of_ours_is_refused() -> None:
    chance = random.Random(0)
    for length in range(300):
        with pytest.raises(CodecError):
            unpack(chance.randbytes(length))
    for metadata in ({"format": "pt"}, {"fedalt": ""}, {"a": "", "fedalt": "0" * 64 + "{}"}, None):
        with pytest.raises(CodecError, match="not ours"):
            unpack(safetensors.torch.save({"a": torch.ones(1)}, metadata))


def test_a_header_that_claims_to_be_huge_is_refused_at_once() -> None:
    for claimed in (2**64 - 1, 2**63, 2**40, MAX_HEADER):
        with pytest.raises(CodecError, match="header of"):
            unpack(claimed.to_bytes(8, "little") + DATA[8:])
    with pytest.raises(CodecError, match="truncated"):
        unpack((len(DATA)).to_bytes(8, "little") + DATA[8:])
    with pytest.raises(CodecError, match="can be read"):
        pack({"facts": "x" * MAX_HEADER}, {})


def with_header(text: bytes, rest: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"",
        b"1",
        b"null",
        b"[]",
        b"{}",
        b'{"__metadata__":1}',
        b'{"__metadata__":{"fedalt":1}}',
        b'{"__metadata__":{"fedalt":[]}}',
        b'{"__metadata__":{"fedalt":""}}',
        b'{"__metadata__":{"fedalt":"\\ud800"}}',
        b"\xff\xfe{}",
        b'{"a":' + b"1" * 5000 + b"}",
        "{}".encode("utf-16"),
    ],
    ids=lambda text: repr(text[:60]),
)
def test_an_odd_header_is_refused(text: bytes) -> None:
    with pytest.raises(CodecError):
        unpack(with_header(text))


def test_an_unknown_version_is_named() -> None:
    with pytest.raises(CodecError, match="version '3' of the format, but only '2' is known"):
        unpack(DATA.replace(b'\\"version\\":\\"2\\"', b'\\"version\\":\\"3\\"'))
    first = b'{"__metadata__":{"class":"message","facts":"{}","format":"fedalt","version":"1"}}'
    with pytest.raises(CodecError, match="version '1' of the format, but only '2' is known"):
        unpack(with_header(first))


def forge(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The message with another header, whose digest is right."""
    header = json.loads(DATA[8:HEAD])
    change(header)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return sealed(with_header(text + b" " * (-len(text) % 8), DATA[HEAD:]))


A = "tree/individual/A/layers.0.q"
B = "tree/individual/B/layers.0.q"


def test_a_forged_header_without_a_change_is_the_original() -> None:
    assert forge(lambda header: None) == DATA


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[A].update(shape=[3, 1, 2**62]),
        lambda h: h[A].update(shape=[2**70, 0]),
        lambda h: h[A].update(shape=[-1, -3]),
        lambda h: h[A].update(shape=[1.0, 3]),
        lambda h: h[A].update(shape=[True, 3]),
        lambda h: h[A].update(shape=3),
        lambda h: h[A].update(shape=None),
        lambda h: h[A].update(shape="13"),
        lambda h: h[A].update(shape=[1] * 33 + [3]),
        lambda h: h[A].update(shape=[10**4000] * 32),
        lambda h: h[A].update(dtype="F33"),
        lambda h: h[A].update(dtype="I32x"),
        lambda h: h[A].update(dtype="U32"),
        lambda h: h[A].update(dtype=["F32"]),
        lambda h: h[A].update(dtype=None),
        lambda h: h[A].update(data_offsets=[0, 12]),
        lambda h: h[A].update(data_offsets=[16, 2**64]),
        lambda h: h[A].update(data_offsets=[16, 10**4300 - 1]),
        lambda h: h[A].update(data_offsets=None),
        lambda h: h[A].update(data_offsets=["16", "28"]),
        lambda h: h[A].pop("dtype"),
        lambda h: h[A].pop("data_offsets"),
        lambda h: h[A].update(data_offsets=[0, 12]) or h[B].update(data_offsets=[0, 16]),
        lambda h: h.update({A: None}),
        lambda h: h.update({A: []}),
        lambda h: h.pop(A),
        lambda h: h.update(x={"dtype": "U8", "shape": [0, 2**62, 4], "data_offsets": [31, 31]}),
        lambda h: h.update(x={"dtype": "U8", "shape": [0, 2**63], "data_offsets": [31, 31]}),
        lambda h: h["__metadata__"].update(more=1),
        lambda h: h["__metadata__"].update(fedalt=1),
        lambda h: h["__metadata__"].pop("fedalt"),
    ],
)
def test_a_forged_header_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(CodecError):
        decode(Message, forge(change))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"clients":2', '"clients":NaN'),
        ('"clients":2', '"clients":1e999'),
        ('"clients":2', '"clients":2,"clients":2'),
        ('"clients":2', '"clients": 2'),
        ('"clients":2', '"clients":' + "1" * 5000),
        ('"clients":2', '"clients":' + "[" * 10**6),
        ('"clients":2', '"clients":'),
        (',"version":"2"', ""),
        (',"version":"2"', ',"version":2'),
        (',"version":"2"', ',"version":[]'),
    ],
    ids=lambda text: text[:20],
)
def test_forged_facts_are_refused(old: str, new: str) -> None:
    def change(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        assert old in metadata["fedalt"]
        metadata["fedalt"] = metadata["fedalt"].replace(old, new)

    with pytest.raises(CodecError):
        decode(Message, forge(change))


def test_tensors_are_laid_out_wide_first_and_so_aligned() -> None:
    header = json.loads(DATA[8:HEAD])
    assert HEAD % 8 == 0
    assert header[B]["data_offsets"] == [0, 16]
    assert header[A]["data_offsets"] == [16, 28]
    assert header["tree/mixer/G/layers.0/q"]["data_offsets"] == [28, 31]


def test_decoded_tensors_lie_in_memory_as_torch_aligns_it() -> None:
    for tensor in decode(Message, DATA).tree.values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
