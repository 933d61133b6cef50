"""Arithmetic and selection over trees, by numbers small enough to check by hand."""

import pytest
import torch

from fedalt.core import tree as trees
from fedalt.core.tree import Name, Tree

A = Name("layers.0.q", "individual", "A")
B = Name("layers.0.q", "individual", "B")
ROW = Name("layers.0.q", "rest_of_world", "A")


def values(tree: Tree) -> dict[Name, list[float]]:
    return {name: tensor.tolist() for name, tensor in tree.items()}


def tree_of(**numbers: float) -> Tree:
    """One number for each site."""
    return {Name(site, "s", "A"): torch.tensor([number]) for site, number in numbers.items()}


def test_a_name_reads_as_slot_factor_site() -> None:
    assert str(A) == f"{A}" == "individual/A/layers.0.q"


def test_select_takes_whole_slots_and_no_look_alikes() -> None:
    longer = A._replace(slot="individual_2")
    tree = dict.fromkeys((A, B, ROW, longer), torch.zeros(1))
    assert trees.select(tree, "individual").keys() == {A, B}
    assert trees.select(tree, "individual", "rest_of_world").keys() == {A, B, ROW}
    assert trees.select(tree, "mixer") == {}
    assert trees.select(tree) == {}


def test_move_renames_one_slot_and_leaves_out_the_others() -> None:
    tree = {A: torch.tensor([1.0]), ROW: torch.tensor([2.0])}
    moved = trees.move(tree, "individual", "shared")
    assert values(moved) == {A._replace(slot="shared"): [1]}
    assert tree.keys() == {A, ROW}


def test_merge_joins_trees_and_refuses_a_name_twice() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    merged = trees.merge({A: one}, {}, {B: two})
    assert merged[A] is one
    assert merged[B] is two
    assert trees.merge() == {}
    with pytest.raises(ValueError, match=r"both hold individual/B/layers\.0\.q"):
        trees.merge({A: one}, {B: two}, {B: two})


def test_replace_exchanges_tensors_and_brings_no_new_names() -> None:
    tree = {A: torch.zeros(1), B: torch.zeros(1)}
    assert values(trees.replace(tree, {B: torch.ones(1)})) == {A: [0], B: [1]}
    assert values(tree) == {A: [0], B: [0]}
    with pytest.raises(ValueError, match=r"no rest_of_world/A/layers\.0\.q to replace"):
        trees.replace(tree, {ROW: torch.ones(1)})


def test_add_subtract_and_scale_go_element_by_element() -> None:
    left, right = tree_of(q=1.0, k=5.0), tree_of(k=2.0, q=10.0)
    q, k = Name("q", "s", "A"), Name("k", "s", "A")
    assert values(trees.add(left, right)) == {q: [11], k: [7]}
    assert values(trees.subtract(left, right)) == {q: [-9], k: [3]}
    assert values(trees.scale(left, -0.5)) == {q: [-0.5], k: [-2.5]}
    assert values(left) == {q: [1], k: [5]}


def test_a_total_is_kept_in_float64_and_in_its_own_memory() -> None:
    first = tree_of(a=1.0, b=2.0)
    total = trees.accumulate({}, first, 2.0)
    assert trees.accumulate(total, tree_of(a=10.0, b=1e-9), -1.0) is total
    a, b = total.values()
    assert a.item() == -8.0
    assert b.item() == pytest.approx(4.0 - 1e-9, abs=1e-15)  # float32 would have lost it
    assert values(first) == values(tree_of(a=1.0, b=2.0))
    with pytest.raises(ValueError, match="lacks 2 tensors"):
        trees.accumulate(total, tree_of(c=1.0), 1.0)


@pytest.mark.parametrize("shape", [(3, 1), (300, 500), (2, 65536)])
def test_a_total_of_large_tensors_is_the_plain_sum(shape: tuple[int, int]) -> None:
    name = Name("a", "s", "A")
    stream = torch.Generator().manual_seed(0)
    each = [torch.randn(shape, generator=stream) for _ in range(3)]
    total: Tree = {}
    for weight, tensor in enumerate(each, 1):
        trees.accumulate(total, {name: tensor.T.contiguous().T}, weight)
    plain = sum(weight * tensor.double() for weight, tensor in enumerate(each, 1))
    torch.testing.assert_close(total[name], plain, rtol=1e-14, atol=1e-14)


def test_arithmetic_refuses_trees_of_different_names() -> None:
    with pytest.raises(ValueError, match="lacks 1 tensors, first s/A/k"):
        trees.add(tree_of(q=1.0, k=1.0), tree_of(q=1.0))
    with pytest.raises(ValueError, match="has 1 unexpected tensors, first s/A/k"):
        trees.subtract(tree_of(q=1.0), tree_of(q=1.0, k=1.0))


def test_apply_takes_any_number_of_trees() -> None:
    three = [tree_of(q=number) for number in (2.0, 3.0, 4.0)]
    product = trees.apply(lambda one, two, other: one * two * other, *three)
    assert values(product) == {Name("q", "s", "A"): [24]}


def test_require_same_names_says_what_differs() -> None:
    trees.require_same_names([A, B], [B, A], "the upload")
    with pytest.raises(ValueError, match=r"^the upload lacks 2 tensors, first individual/A/"):
        trees.require_same_names([], [B, A], "the upload")
    with pytest.raises(ValueError, match=r"^the upload has 1 unexpected .* individual/B/"):
        trees.require_same_names([A, B], [A], "the upload")


@pytest.mark.parametrize(
    ("tree", "error"),
    [
        ({A: torch.ones(2, 3)}, "^the upload lacks 1 tensors, first individual/B/layers.0.q"),
        ({A: torch.ones(2, 3), B: torch.ones(4, 2), ROW: torch.ones(1)}, "first rest_of_world/A/"),
        ({A: torch.ones(3, 2), B: torch.ones(4, 2)}, r"individual/A/.*\(3, 2\), but \(2, 3\)"),
    ],
)
def test_check_tree_names_what_differs(tree: Tree, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        trees.check_tree(tree, {A: (2, 3), B: (4, 2)}, "the upload")


def test_check_tree_accepts_what_is_expected() -> None:
    tree = {A: torch.ones(2, 3), B: torch.ones(4, 2, dtype=torch.int64)}
    trees.check_tree(tree, {A: (2, 3), B: torch.Size([4, 2])}, "the upload")


def test_zeros_like_keeps_shape_and_dtype() -> None:
    zeros = trees.zeros_like({A: torch.ones(2, 3, dtype=torch.float64)})
    assert zeros[A].dtype == torch.float64
    assert zeros[A].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_cast_changes_the_dtype_and_nothing_else() -> None:
    cast = trees.cast({A: torch.tensor([0.5, 3.0])}, torch.bfloat16)
    assert cast[A].dtype == torch.bfloat16
    assert cast[A].tolist() == [0.5, 3.0]


def test_a_copy_shares_neither_memory_nor_graph() -> None:
    tree = {A: torch.ones(1, requires_grad=True) * 2}
    copied = trees.copy(tree)
    copied[A].fill_(7)
    assert tree[A].tolist() == [2]
    assert not copied[A].requires_grad


def test_on_moves_every_tensor() -> None:
    moved = trees.on({A: torch.ones(2), B: torch.ones(3)}, "meta")
    assert {name: (tensor.device.type, tensor.shape[0]) for name, tensor in moved.items()} == {
        A: ("meta", 2),
        B: ("meta", 3),
    }


def test_numbers_counts_elements() -> None:
    assert trees.numbers({A: torch.zeros(2, 3), B: torch.zeros(4), ROW: torch.zeros(())}) == 11
    assert trees.numbers({}) == 0


@pytest.mark.parametrize(
    "other",
    [
        {},
        {A: torch.tensor([1.0, 2.0]), B: torch.zeros(1)},
        {B: torch.tensor([1.0, 2.0])},
        {A: torch.tensor([1.0, 2.5])},
        {A: torch.tensor([[1.0, 2.0]])},
        {A: torch.tensor([1.0, 2.0], dtype=torch.float64)},
    ],
    ids=["empty", "one more", "other name", "other value", "other shape", "other dtype"],
)
def test_trees_that_differ_anywhere_are_not_equal(other: Tree) -> None:
    tree = {A: torch.tensor([1.0, 2.0])}
    assert trees.equal(tree, trees.copy(tree))
    assert not trees.equal(tree, other)
    assert not trees.equal(other, tree)
