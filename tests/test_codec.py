"""States and messages survive their bytes; whatever else is decoded ends in CodecError."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from fedalt.core import container
from fedalt.core.codec import CodecError, decode, encode, fields_of, read, require_finite, write
from fedalt.core.tree import Name, Tree
from fedalt.federation.messages import Answer, Call
from fedalt.methods import METHODS
from fedalt.methods.contract import Ledger, MemoryLedger, Message
from fedalt.methods.fedit import Client as FedITClient
from fedalt.methods.local import Client as LocalClient

A = Name("layers.0.q", "individual", "A")
B = Name("layers.0.q", "individual", "B")
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int64,
)


@dataclass(frozen=True)
class Fixed:
    TAG: ClassVar = "fixed"

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("at least one weight is needed")


@dataclass(frozen=True)
class Learned:
    TAG: ClassVar = "learned"

    tree: Tree
    step: int = 0


@dataclass(frozen=True)
class Grouped:
    TAG: ClassVar = "grouped"

    trees: Mapping[str, Tree]


def same(left: object, right: object) -> bool:
    """Equal with types, to the bit: 1 is not 1.0, nan is nan."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        raw = (left.contiguous().reshape(-1), right.contiguous().reshape(-1))
        one, two = (each.view(torch.uint8).tolist() for each in raw)
        return left.dtype == right.dtype and left.shape == right.shape and one == two
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "__dataclass_fields__"):
        return same(vars(left), vars(right))
    return repr(left) == repr(right)  # repr tells 0.0 from -0.0 and finds nan equal to nan


def test_a_tree_comes_back_sorted_by_name() -> None:
    tree = {Name(site, "s", "A"): torch.zeros(1) for site in ("b", "c", "a")}
    tree[Name("aa", "t", "A")] = torch.zeros(1, dtype=torch.float64)
    sites = [name.site for name in decode(Message, encode(Message(tree))).tree]
    assert sites == ["a", "aa", "b", "c"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0),
        torch.zeros(2, 0, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.ones(1).expand(4),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([2**62 + 1]),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=["zero-dim", "empty", "empty 3d", "transposed", "expanded", "bf16", "int64", "parameter"],
)
def test_a_tensor_survives(tensor: Tensor) -> None:
    (back,) = decode(Message, encode(Message({A: tensor}))).tree.values()
    assert back.dtype == tensor.dtype
    assert not back.requires_grad
    assert torch.equal(back, tensor.detach())


def test_tensors_that_share_memory_come_back_apart() -> None:
    whole = torch.arange(3.0)
    tree = decode(Message, encode(Message({A: whole[:2], B: whole[1:]}))).tree
    tree[A].fill_(9)
    assert tree[B].tolist() == [1, 2]


def test_decoded_tensors_have_memory_of_their_own_that_may_be_written() -> None:
    data = encode(Message({A: torch.zeros(2)}))
    decode(Message, data).tree[A].fill_(1)
    assert decode(Message, data).tree[A].tolist() == [0, 0]


def test_odd_floats_come_back_unless_finite_ones_are_asked_for() -> None:
    data = encode(Message({}, {"a": math.inf, "b": -math.inf, "c": math.nan, "d": -0.0}))
    assert repr(dict(decode(Message, data).facts)) == "{'a': inf, 'b': -inf, 'c': nan, 'd': -0.0}"
    with pytest.raises(CodecError, match="facts/a is inf"):
        decode(Message, data, finite=True)


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each.is_floating_point])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_an_odd_number_in_a_tensor_is_refused_where_asked(dtype: torch.dtype, odd: float) -> None:
    tree = {A: torch.zeros(3, dtype=dtype), B: torch.tensor([1, odd], dtype=dtype)}
    decode(Message, encode(Message(tree)))
    with pytest.raises(CodecError, match=r"tree/individual/B/layers\.0\.q holds NaN"):
        decode(Message, encode(Message(tree)), finite=True)
    with pytest.raises(CodecError, match=r"individual/B/layers\.0\.q holds NaN"):
        require_finite((str(name), tensor) for name, tensor in tree.items())


def test_the_largest_finite_numbers_pass_as_finite() -> None:
    tree = {
        Name(str(dtype), "s", "A"): torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min])
        .to(dtype)
        .clone()
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    tree[A] = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert same(decode(Message, encode(Message(tree)), finite=True).tree, tree)


def test_an_int_declared_float_becomes_that_float() -> None:
    value = decode(Fixed, encode(Fixed((1, 2.5)))).weights
    assert repr(value) == "(1.0, 2.5)"


# Fields kept elsewhere.


@dataclass(frozen=True)
class Server:
    TAG: ClassVar = "server"

    total: Tree
    weight: float
    latest: Ledger


def test_a_ledger_is_left_out_and_given_back() -> None:
    server = Server({A: torch.ones(2)}, 2.0, MemoryLedger({"a": Message({})}))
    assert fields_of(Server, Ledger) == ("latest",)
    data = encode(server, omit=("latest",))
    back = decode(Server, data, given={"latest": server.latest})
    assert back.latest is server.latest
    assert back.weight == 2.0
    with pytest.raises(CodecError, match="lacks the field 'latest'"):
        decode(Server, data)
    with pytest.raises(CodecError, match="unexpected field 'weight'"):
        decode(Server, data, given={"latest": {}, "weight": 1.0})
    with pytest.raises(CodecError, match=r"latest is declared .*Ledger.*, which the codec cannot"):
        encode(server)
    with pytest.raises(CodecError, match="no field 'lastest' to omit"):
        encode(server, omit=("lastest",))


# What encode refuses.


@dataclass(frozen=True)
class Odd:
    TAG: ClassVar = "odd"

    field: Any


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Message({Name("q", "a/b", "A"): torch.ones(1)}), "'a/b' is part of a tensor's key"),
        (Message({Name("q", "a", "A/"): torch.ones(1)}), "'A/' is part of a tensor's key"),
        (Message({Name("\ud800", "a", "A"): torch.ones(1)}), "tree holds what JSON cannot"),
        (
            Message({A: torch.ones(1, dtype=torch.complex64)}),
            "individual/A/layers.0.q is a .*compl",
        ),
        (Message({A: torch.ones(1, device="meta")}), "individual/A/layers.0.q is .* on meta"),
        (Message({A: torch.eye(2).to_sparse()}), "individual/A/layers.0.q is a torch.sparse"),
        (Message({A: torch.ones([1] * 33)}), "has 33 dimensions"),
        (Message({A: 1.0}), r"individual/A/layers.0.q is 1.0 instead of a tensor"),
        (Message({("q", "a", "A"): torch.ones(1)}), "^tree is"),
        (Message({}, {"n": None}), "facts/n is None"),
        (Message({}, {"n": torch.ones(1)}), r"facts/n is tensor\(\[1.\]\)"),
        (Message({}, {"n": [1]}), r"facts/n is \[1\]"),
        (Message({}, {1: 1}), r"facts is \{1: 1\}"),
        (Message({}, {"n": 10**5000}), "facts/n is an int of 16610 bits, expected at most 63"),
        (Message({}, {"n": -(2**63)}), "facts/n is an int of 64 bits, expected at most 63"),
        (Message({}, {"n": "\ud800"}), "facts/n holds what JSON cannot"),
        (Message({}, {"\ud800": 1}), "facts holds what JSON cannot"),
        (Fixed((2**53 + 1,)), "weights/0 is 9007199254740993"),
        (Fixed([1.0]), r"weights is \[1.0\]"),
        (Odd(1), "field is declared Any, which the codec cannot hold"),
        (7, "int is no dataclass"),
    ],
)
def test_encode_refuses(message: object, error: str) -> None:
    with pytest.raises(CodecError, match=error):
        encode(message)


# What decode refuses. A forged file is written like ours, checksum and all.


def forged(
    facts: object, tensors: Mapping[str, Tensor] | None = None, cls: type = Message
) -> bytes:
    return container.pack({"class": vars(cls)["TAG"], "facts": facts}, tensors or {})


ONE = torch.ones(1)
EMPTY = {"mapping": {}}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (forged({"tree": {"tree": 0}}), "message lacks the field 'facts'"),
        (forged({"tree": {"tree": 0}, "facts": EMPTY, "more": 1}), "unexpected field 'more'"),
        (forged({"tree": {"tree": 1}, "facts": EMPTY}), "tree holds 0 tensors instead of 1"),
        (forged({"tree": {"tree": -1}, "facts": EMPTY}), "tree holds 0 tensors instead of -1"),
        (forged({"tree": {"tree": 10**4299}, "facts": EMPTY}), "tree is an int of 14281 bits"),
        (forged({"tree": {"tree": True}, "facts": EMPTY}), r"tree is \{'tree': True\}"),
        (forged({"tree": {"tree": 0}, "facts": EMPTY}, {"x": ONE}), "1 unexpected .* first x"),
        (forged({"tree": {"tree": 0}, "facts": EMPTY}, {"tree/a/b/c": ONE}), "first tree/a/b/c"),
        (
            forged({"tree": {"tree": 1}, "facts": EMPTY}, {"tree/a/b": ONE}),
            "0 tensors instead of 1",
        ),
        (forged({"tree": {"tree": 1}, "facts": EMPTY}, {"x/a/b": ONE}), "0 tensors instead of 1"),
        (forged({"tree": EMPTY, "facts": EMPTY}), r"tree is \{'mapping'"),
        (forged({"tree": None, "facts": EMPTY}), "tree is None"),
        (forged({"tree": {"tree": 0}, "facts": {}}), r"facts is \{\}"),
        (forged({"tree": {"tree": 0}, "facts": {"mapping": [1]}}), r"facts is \{'mapping': \[1\]"),
        (forged({"tree": {"tree": 0}, "facts": {"mapping": {"n": None}}}), "facts/n is None"),
        (
            forged({"tree": {"tree": 0}, "facts": {"mapping": {"n": 10**4300 - 1}}}),
            "facts/n is an int of 14285 bits, expected at most 63",
        ),
        (
            forged({"tree": {"tree": 0}, "facts": {"mapping": {"n": 2**63}}}),
            "facts/n is an int of 64 bits, expected at most 63",
        ),
        (forged({"tree": {"tree": 0}, "facts": {"mapping": {"n": {"float": "1"}}}}), "facts/n is"),
        (forged({"tree": {"tree": 0}, "facts": {"mapping": {"n": {"float": []}}}}), "facts/n is"),
        (forged([]), r"message is \[\] instead of fields"),
        (forged(""), r"message is '' instead of fields"),
        (container.pack({"facts": {}}, {}), r"metadata are \['facts'\]"),
        (container.pack({"class": "a", "facts": {}, "x": ""}, {}), "metadata are"),
    ],
)
def test_decode_refuses_a_forged_message(data: bytes, error: str) -> None:
    with pytest.raises(CodecError, match=error):
        decode(Message, data)


def test_what_the_class_itself_refuses_is_a_codec_error() -> None:
    with pytest.raises(CodecError, match="fixed: at least one weight"):
        decode(Fixed, forged({"weights": []}, cls=Fixed))


def test_a_key_that_could_be_read_two_ways_is_refused_both_ways() -> None:
    with pytest.raises(CodecError, match="'a/b' is part of a tensor's key"):
        encode(Grouped({"a/b": {A: ONE}}))
    facts = {"trees": {"mapping": {"a/b": {"tree": 1}}}}
    with pytest.raises(CodecError, match="'a/b' is part of a tensor's key"):
        decode(Grouped, forged(facts, {f"trees/a/b/{A}": ONE}, Grouped))


def test_a_state_of_another_method_is_refused() -> None:
    data = encode(LocalClient({}, {}))
    with pytest.raises(CodecError, match=r"local/client, but a fedit/client was expected"):
        decode(FedITClient, data)


# Files.


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "state", Learned({A: ONE}, 3))
    assert same(read(Learned, tmp_path / "state"), Learned({A: ONE}, 3))
    assert (tmp_path / "state").read_bytes() == encode(Learned({A: ONE}, 3))


def test_errors_about_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(CodecError, match=f"^{path}: step is 'x'"):
        write(path, Learned({}, "x"))  # type: ignore[arg-type]
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=str(path)):
        read(Learned, path)
    path.write_bytes(encode(Learned({}))[:-1])
    with pytest.raises(CodecError, match=f"^{path}: truncated"):
        read(Learned, path)


def stored(cls: type) -> Iterator[type]:
    """A stored class and the dataclasses that its fields hold."""
    yield cls
    hints = [hint for name, hint in get_type_hints(cls).items() if name != "TAG"]
    while hints:
        hint = hints.pop()
        hints += get_args(hint)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from stored(hint)


def test_every_stored_class_has_a_tag_of_its_own() -> None:
    roots = [Call, Answer]
    for method in METHODS.values():
        roots += [method.server_state, method.client_state]
    tags = {each: vars(each).get("TAG") for root in roots for each in stored(root)}
    assert {"moments", "message", "fedalt/server"} <= set(tags.values())
    assert None not in tags.values()
    assert len(set(tags.values())) == len(tags)
