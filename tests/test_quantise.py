"""Trees in few bits a number: what is lost, and bytes that are no such tree."""

import zlib

import pytest
import torch
from torch import Generator

from fedalt.core.container import CodecError
from fedalt.core.quantise import pack, unpack
from fedalt.core.tree import Name, Tree

X = Name("layer", "slot", "A")
NUMBERS = Name("", "packed", "numbers")
LAYOUT = Name("", "packed", "layout")


def stream(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def back(tree: Tree, kind: str, seed: int = 0) -> Tree:
    return unpack(pack(tree, kind, stream(seed)), kind, lambda _: None)


def test_levels_by_hand():
    row = torch.tensor([[127.0, -3.0, 0.5, 0.0]])
    read = [back({X: row}, "int8", seed)[X] for seed in range(20)]
    assert all(torch.equal(each[0, [0, 1, 3]], row[0, [0, 1, 3]]) for each in read)
    assert {each[0, 2].item() for each in read} == {0.0, 1.0}
    row = torch.tensor([[7.0, -7.0, 2.5, -2.5, 1.0]])  # an odd number of halves of bytes
    read = [back({X: row}, "int4", seed)[X] for seed in range(20)]
    assert all(torch.equal(each[0, [0, 1, 4]], row[0, [0, 1, 4]]) for each in read)
    assert {each[0, 2].item() for each in read} == {2.0, 3.0}
    assert {each[0, 3].item() for each in read} == {-2.0, -3.0}


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 7)])
def test_each_index_of_the_rank_has_a_step_of_its_own(kind: str, levels: int):
    b = torch.randn(50, 3, generator=stream(1)) * torch.tensor([1e-6, 1.0, 1e6])
    off = (back({X: b}, kind)[X] - b).abs().amax(0)
    assert (off <= b.abs().amax(0) / levels * (1 + 1e-5)).all()
    a = b.T.contiguous()
    off = (back({X: a}, kind)[X] - a).abs().amax(1)
    assert (off <= a.abs().amax(1) / levels * (1 + 1e-5)).all()


def test_rounding_is_right_on_average():
    row = torch.tensor([[7.0, 0.3, -1.8]])
    read = torch.stack([back({X: row}, "int4", seed)[X] for seed in range(2000)])
    assert torch.allclose(read.mean(0), row, atol=0.05)  # a deviation of 0.5 / 2000 ** 0.5


def test_bf16_is_the_nearest():
    tree = {X: torch.randn(7, 9, generator=stream())}
    assert torch.equal(back(tree, "bf16")[X], tree[X].bfloat16().float())


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_shapes_and_zeros_come_back(kind: str):
    shapes = [(3, 5), (5, 3), (4,), (), (2, 2, 2), (0, 4), (4, 0), (1, 1)]
    tree = {Name(f"l{at}", "s", "B"): torch.zeros(shape) for at, shape in enumerate(shapes)}
    read = back(tree, kind)
    assert all(torch.equal(read[name], tensor) for name, tensor in tree.items())
    assert back({}, kind) == {}


def test_int4_takes_half_a_byte_a_number_and_equal_streams_give_equal_bytes():
    tree = {X: torch.rand(8, 1000, generator=stream()) * 2 - 1}
    packed, again = pack(tree, "int4", stream(1)), pack(tree, "int4", stream(1))
    assert torch.equal(packed[NUMBERS], again[NUMBERS])
    assert packed[NUMBERS].numel() < 8 * 1000 / 2 + 8 * 4 + 100


def bytes_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("layout", "numbers", "said"),
    [
        (b"no", b"", "the layout cannot be read"),
        (b'[["l","s","A",[-1]]]', b"", "sorted names"),
        (b'[["l","s","A",[1]],["l","s","A",[1]]]', b"", "sorted names"),
        (b'[["l","s","A",[99999,99999]]]', b"", "at most"),
        (b'[["l","s","A",[2,2]]]', bytes(11), "the layout announces 12"),
        (b'[["l","s","A",[2,2]]]', bytes(10**7), "the layout announces 12"),
    ],
)
def test_other_bytes_are_refused(layout: bytes, numbers: bytes, said: str):
    with pytest.raises(CodecError, match=said):
        unpack({LAYOUT: bytes_of(layout), NUMBERS: bytes_of(numbers)}, "int8", lambda _: None)


def test_damaged_and_missing_parts_are_refused():
    packed = pack({X: torch.ones(2, 2)}, "int8", stream())
    with pytest.raises(CodecError, match="the numbers cannot be read"):
        unpack({**packed, NUMBERS: packed[NUMBERS] + 1}, "int8", lambda _: None)
    with pytest.raises(CodecError, match="expected layout and numbers"):
        unpack({LAYOUT: packed[LAYOUT]}, "int8", lambda _: None)


def test_shapes_are_told_before_numbers_are_read():
    def refuse(shapes: object) -> None:
        assert shapes == {X: (2, 2)}
        raise KeyError

    packed = pack({X: torch.ones(2, 2)}, "int8", stream())
    with pytest.raises(KeyError):
        unpack({**packed, NUMBERS: torch.zeros(3, dtype=torch.uint8)}, "int8", refuse)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_what_packs_best_is_still_read(kind: str):
    tree = {X: torch.zeros(30, 5000)}  # each byte is the same, and takes one bit
    assert torch.equal(back(tree, kind)[X], tree[X])


def test_a_few_bytes_do_not_stand_for_many():
    layout = b'[["l","s","A",[1,1000000]]]'
    packed = {LAYOUT: bytes_of(layout), NUMBERS: bytes_of(bytes(4 + 10**6))}
    with pytest.raises(CodecError, match="what was sent holds at most"):
        unpack(packed, "int8", lambda _: None)


def test_as_many_numbers_are_read_as_are_sent():
    """No fixed number of them is too many, such as those of adapters stacked by a server."""
    layout = f'[["l","s","A",[1,{2**28 + 2}]]]'.encode()
    enough = torch.zeros(2**24 + 64, dtype=torch.uint8)  # the least that could hold as many
    with pytest.raises(CodecError, match="the numbers cannot be read"):  # and not "at most"
        unpack({LAYOUT: bytes_of(layout), NUMBERS: enough}, "int4", lambda _: None)
