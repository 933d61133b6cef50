"""Any state survives its bytes, and no bytes but its own decode to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import DTYPES, ONE, A, B, Fixed, Learned, forged, same
from torch import Tensor

from fedalt.core import container
from fedalt.core.codec import CodecError, decode, encode
from fedalt.core.tree import Name, Tree
from fedalt.methods.contract import Fact, Message


@dataclass(frozen=True)
class State:
    """Every kind of field at once."""

    TAG: ClassVar = "state"

    individual: Tree
    inner: Learned
    combine: Fixed | Learned
    rate: float = 0.5
    phase: Literal["warm-up", "main"] = "main"
    note: str | None = None
    best: float | int | None = None
    carried: Tree | None = None
    pair: tuple[int, str] = (1, "a")
    history: tuple[Learned, ...] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)
    groups: Mapping[str, Tree] = field(default_factory=dict)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), max_size=4)
names = st.builds(
    Name, site=texts | st.sampled_from(["a/b", "layers.0.q"]), slot=parts, factor=parts
)
integers = st.integers(1 - 2**63, 2**63 - 1)
facts = st.dictionaries(texts, st.booleans() | integers | st.floats() | texts, max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits at all, NaNs too, and any strides."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=stream)
    tensor = bits.to(torch.uint8).view(dtype).reshape(shape)
    return tensor.mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


trees = st.dictionaries(names, tensors(), max_size=4)
learned = st.builds(Learned, trees, integers)
states = st.builds(
    State,
    individual=trees,
    inner=learned,
    combine=learned | st.builds(Fixed, st.lists(st.floats(), min_size=1, max_size=3).map(tuple)),
    rate=st.floats(),
    phase=st.sampled_from(["warm-up", "main"]),
    note=st.none() | texts,
    best=st.none() | integers | st.floats(),
    carried=st.none() | trees,
    pair=st.tuples(integers, texts),
    history=st.lists(learned, max_size=2).map(tuple),
    facts=facts,
    groups=st.dictionaries(parts, trees, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(states)
def test_a_state_survives_its_bytes(state: State) -> None:
    assert same(decode(State, encode(state)), state)


@settings(max_examples=50, deadline=None)
@given(trees, facts)
def test_a_message_survives_its_bytes(tree: Tree, facts: Mapping[str, Fact]) -> None:
    assert same(decode(Message, encode(Message(tree, facts))), Message(tree, facts))


@settings(max_examples=50, deadline=None)
@given(trees, facts)
def test_the_order_of_a_dictionary_does_not_reach_the_bytes(
    tree: Tree, facts: Mapping[str, Fact]
) -> None:
    turned = Message(dict(reversed(tree.items())), dict(reversed(facts.items())))
    assert encode(turned) == encode(Message(tree, facts))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats()
    | st.sampled_from(["nan", "inf", "main", "tree"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["tree", "mapping", "float", "a", "a/b"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(State.__dataclass_fields__)), plain)
def test_any_facts_end_in_an_error_or_in_a_value_with_the_same_bytes(name: str, odd: Any) -> None:
    state = State({A: ONE}, Learned({B: ONE}), Fixed((1.0,)), groups={"a": {A: ONE}})
    content, tensors = container.unpack(encode(state))
    try:
        data = forged({**content["facts"], name: odd}, tensors, State)
    except ValueError:
        return  # nan, which JSON cannot hold
    try:
        back = decode(State, data)
    except CodecError:
        return
    assert encode(back) == data
