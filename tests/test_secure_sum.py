"""Secure sums by themselves: masks, shares and integers."""

from itertools import combinations
from secrets import token_bytes

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fedalt.core.tree import Name, Tree
from fedalt.federation import secure_sum
from fedalt.federation.secure_sum import (
    KEY,
    RANGE,
    SECRET,
    SecureSumError,
    Vector,
    agree,
    expand,
    integers,
    join,
    masked,
    modulo,
    public_of,
    seal,
    signed,
    split,
    steps_of,
    threshold,
    tree_of,
    unmask,
    unseal,
)

ABOUT = "letters, 1234, round 0"


class Party:
    """A client's secrets of a round."""

    def __init__(self) -> None:
        self.mask, self.seed = token_bytes(KEY), token_bytes(KEY)
        self.public = public_of(self.mask)


def vectors(count: int, numbers: int = 1000) -> dict[str, np.ndarray]:
    stream = np.random.default_rng(count)
    return {f"client {at}": stream.integers(-(2**20), 2**20, numbers) for at in range(count)}


@pytest.mark.parametrize("count", [3, 4, 7, 12])
@pytest.mark.parametrize("away", [0, 1])
def test_the_sum_is_right_whoever_vanishes_after_the_masks_were_agreed_on(
    count: int, away: int
) -> None:
    plain = vectors(count)
    parties = {name: Party() for name in plain}
    publics = {name: party.public for name, party in parties.items()}
    sent = {
        name: masked(modulo(plain[name]), name, party.seed, party.mask, publics, ABOUT)
        for name, party in parties.items()
    }
    present = sorted(plain)[away:]
    total = np.zeros(1000, np.uint32)
    for name in present:
        total = total + sent[name]
    gone = {name: parties[name].mask for name in plain if name not in present}
    total = unmask(
        total,
        [parties[name].seed for name in present],
        gone,
        {name: publics[name] for name in present},
        ABOUT,
    )
    expected = sum(plain[name] for name in present)
    assert np.array_equal(signed(total, count, steps_of(count)), expected)


def test_the_largest_changes_of_the_most_clients_do_not_overflow() -> None:
    for clients in (3, 8, 64, 1000):
        steps = steps_of(clients)
        change = integers({Name("s", "a", "A"): torch.tensor([RANGE])}, steps) * 2
        for sign in (1, -1):
            total = modulo(sign * change * clients)
            assert signed(total, clients, steps)[0] == sign * 2 * RANGE * steps * clients


def test_any_two_thirds_have_the_secret_and_fewer_have_nothing() -> None:
    secret, count = token_bytes(SECRET), 7
    needed = threshold(count)
    shares = dict(enumerate(split(secret, needed, count)))
    assert needed == 5
    for some in combinations(shares, needed):
        assert join({at: shares[at] for at in some}, needed) == secret
    few = {at: shares[at] for at in range(needed - 1)}
    with pytest.raises(SecureSumError, match="4 shares of a secret, but 5 are needed"):
        join(few, needed)
    assert join(few, needed - 1) != secret


@pytest.mark.parametrize("cohort", range(3, 40))
def test_two_groups_of_two_thirds_share_a_third(cohort: int) -> None:
    assert cohort - threshold(cohort) == cohort // 3  # so many may vanish
    assert 2 * threshold(cohort) - cohort >= cohort / 3


def test_a_masked_vector_looks_like_random_numbers() -> None:
    parties = {name: Party() for name in "abc"}
    publics = {name: party.public for name, party in parties.items()}
    a = parties["a"]
    data = masked(np.zeros(250_000, np.uint32), "a", a.seed, a.mask, publics, ABOUT).tobytes()
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    assert chisquare(counts).pvalue > 1e-6
    plain = np.bincount(np.frombuffer(bytes(1000), np.uint8), minlength=256)
    assert chisquare(plain).pvalue < 1e-6


def test_whoever_sees_all_but_the_masks_cannot_tell_vectors_of_the_same_sum_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For other vectors of the same sum there are masks under which the server sees the same."""
    parties = {name: Party() for name in "abc"}
    publics = {name: party.public for name, party in parties.items()}
    pads: dict[bytes, Vector] = {}
    stream = np.random.default_rng(0)

    def pad(seed: bytes, count: int) -> Vector:
        if seed not in pads:
            pads[seed] = stream.integers(0, 2**32, count, dtype=np.uint32)
        return pads[seed]

    monkeypatch.setattr(secure_sum, "expand", pad)

    def seen(plain: dict[str, np.ndarray]) -> dict[str, list[int]]:
        return {
            name: masked(modulo(plain[name]), name, party.seed, party.mask, publics, ABOUT).tolist()
            for name, party in parties.items()
        }

    one = {"a": np.array([5, -7]), "b": np.array([100, 3]), "c": np.array([0, 0])}
    other = {"a": np.array([0, 0]), "b": np.array([0, 0]), "c": np.array([105, -4])}
    first = seen(one)
    for name in "ab":  # what each of them shares with c takes up the difference
        key = agree(parties[name].mask, publics["c"], f"mask {ABOUT}")
        pads[key] = pads[key] + modulo(one[name] - other[name])
    assert seen(other) == first


def test_numbers_survive_as_integers_to_half_a_step() -> None:
    tree: Tree = {
        Name("q", "shared", "A"): torch.randn(3, 4),
        Name("q", "shared", "B"): torch.randn(2, 3),
    }
    steps = steps_of(8)
    back = tree_of(integers(tree, steps), steps, tree)
    assert back.keys() == tree.keys()
    for name, tensor in tree.items():
        assert back[name].shape == tensor.shape
        assert (back[name] - tensor).abs().max() <= 0.5 / steps + 1e-7


@pytest.mark.parametrize("number", [RANGE * 1.01, -1e30, float("nan"), float("inf")])
def test_a_number_that_has_no_room_is_an_error(number: float) -> None:
    with pytest.raises(SecureSumError, match="a secure sum has room for 16"):
        integers({Name("q", "shared", "A"): torch.tensor([number])}, 1.0)


def test_a_sum_that_nobody_can_have_sent_is_an_error() -> None:
    with pytest.raises(SecureSumError, match="a client's was out of range, or its masks"):
        signed(expand(token_bytes(KEY), 1000), 3, steps_of(3))


def test_what_is_sealed_is_opened_by_its_reader_alone() -> None:
    a, b, c = Party(), Party(), Party()
    key = agree(a.mask, b.public, "share: a to b")
    sealed = seal(key, b"a share")
    assert unseal(agree(b.mask, a.public, "share: a to b"), sealed) == b"a share"
    for other in (
        agree(b.mask, a.public, "share: b to a"),
        agree(c.mask, a.public, "share: a to b"),
    ):
        with pytest.raises(SecureSumError, match="was changed on its way"):
            unseal(other, sealed)
    with pytest.raises(SecureSumError, match="was changed on its way"):
        unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]))


def test_a_key_of_no_use_is_an_error() -> None:
    for public in (bytes(KEY), b"short"):
        with pytest.raises(SecureSumError, match="a key of the round is none"):
            agree(token_bytes(KEY), public, "mask")
