"""The sum of vectors that whoever adds them up cannot see one by one.

Bonawitz et al.: "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
figure 4. Client u holds a vector x_u of integers and sends

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)        modulo 2^32

s_uv is agreed with every other client (X25519 and HKDF), b_u is u's own. In the sum the pairwise
masks cancel out. Of clients that vanish after they were counted in, the others give their Shamir
shares of the key behind s_uv; of all that are in the sum, those of b_u. Nobody gives both of one
client, so a late vector stays hidden too. The expansion PRG is ChaCha20.

Nothing here is kept or sent; see secure_client.py and secure_server.py.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import numpy as np
import torch
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedalt.core.tree import Tree

FEWEST: Final = 3  # clients; of two, each would know the other's vector
RANGE: Final = 16.0  # the largest number of an upload; A begins below 1, B at 0
KEY: Final = 32  # bytes of a key
MASK: Final = "mask"  # what a secret is stretched for
SEED: Final = "seed"
SECRET: Final = 16  # bytes of what keys are made of, and of a share of it

Vector = NDArray[np.uint32]


class SecureSumError(ValueError):
    """What no honest partner sends, or what a secure sum has no room for: one sentence."""


class StepOverError(SecureSumError):
    """A step that cannot be answered any more, however often it is asked for."""


def threshold(clients: int) -> int:
    """How many of a round's clients must stay to the end: two thirds, so a third may vanish.

    No two groups of so many share fewer than a third, so a server that tells clients different
    stories learns nothing unless a third of them work with it.
    """
    return -(-2 * clients // 3)


def public_of(secret: bytes) -> bytes:
    """The public half of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, purpose: str) -> bytes:
    """The 32 bytes that two clients have in common for a purpose. Raises SecureSumError."""
    try:
        own, other = X25519PrivateKey.from_private_bytes(secret), X25519PublicKey
        shared = own.exchange(other.from_public_bytes(public))
    except ValueError as error:
        raise SecureSumError(f"a key of the round is none: {error}") from None
    return HKDF(SHA256(), KEY, None, purpose.encode()).derive(shared)


def stretched(secret: bytes, purpose: str) -> bytes:
    """The key that a secret of 16 bytes stands for."""
    return HKDF(SHA256(), KEY, None, purpose.encode()).derive(secret)


def split(secret: bytes, needed: int, count: int) -> list[bytes]:
    """Shares of a secret of 16 bytes, of which any `needed` give it back and fewer nothing."""
    return [share for _, share in Shamir.split(needed, count, secret, False)]


def join(shares: Mapping[int, bytes], needed: int) -> bytes:
    """The secret behind shares, each by its number from 0. Raises SecureSumError for too few."""
    if len(shares) < needed:
        raise SecureSumError(f"{len(shares)} shares of a secret, but {needed} are needed")
    some = sorted(shares.items())[:needed]
    return bytes(Shamir.combine([(at + 1, share) for at, share in some], False))


def seal(key: bytes, content: bytes) -> bytes:
    """The content, encrypted. The key is used once, so the nonce may be constant."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """What was sealed. Raises SecureSumError."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
    except InvalidTag:
        raise SecureSumError("a share was changed on its way, or is of another round") from None


def expand(seed: bytes, count: int) -> Vector:
    """So many numbers that only who has the seed can tell from random ones."""
    stream = Cipher(ChaCha20(seed, bytes(16)), None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)), np.dtype("<u4")).astype(np.uint32)


def masked(
    vector: Vector, own: str, seed: bytes, secret: bytes, publics: Mapping[str, bytes], about: str
) -> Vector:
    """The vector y of the equation above: `publics` are the other clients' keys, `seed` is b."""
    whole = vector + expand(seed, len(vector))
    for other, key in _pairwise(own, secret, publics, about):
        mask = expand(key, len(vector))
        whole = whole + mask if other > own else whole - mask
    return whole


def unmask(
    total: Vector,
    seeds: Iterable[bytes],
    gone: Mapping[str, bytes],
    present: Mapping[str, bytes],
    about: str,
) -> Vector:
    """The sum of the plain vectors, out of the sum of the masked ones.

    `seeds` are those of all in it, `gone` the secret keys of those that the others have counted in
    but that are not, `present` the public keys of those that are.
    """
    for seed in seeds:
        total = total - expand(seed, len(total))
    for name, secret in gone.items():
        for other, key in _pairwise(name, secret, present, about):
            # What `other` has added for the pair: the opposite of what `name` would have.
            mask = expand(key, len(total))
            total = total + mask if other > name else total - mask
    return total


def _pairwise(
    own: str, secret: bytes, publics: Mapping[str, bytes], about: str
) -> Iterable[tuple[str, bytes]]:
    """With each other client, sorted, the seed of their mask."""
    for other in sorted(publics.keys() - {own}):
        yield other, agree(secret, publics[other], f"mask {about}")


def steps_of(clients: int) -> float:
    """Into how many integers the number 1 is divided: a power of two, so that no sum overflows.

    What a client sends may be the change of an upload to another, twice the range.
    """
    return 2.0 ** math.floor(math.log2((2**31 - 1) / (clients * 2 * RANGE)))


def integers(tree: Tree, steps: float) -> NDArray[np.int64]:
    """All numbers of a tree, its names sorted, as integers. Raises SecureSumError out of range."""
    flat = [tree[name].detach().cpu().double().flatten() for name in sorted(tree)]
    whole = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)
    most = float(whole.abs().max()) if len(whole) else 0.0
    if not most <= RANGE:
        raise SecureSumError(f"a number of {most:.6g}, but a secure sum has room for {RANGE:g}")
    return (whole * steps).round().to(torch.int64).numpy()


def tree_of(whole: NDArray[np.int64], steps: float, like: Tree) -> Tree:
    """Integers as a tree of the names, shapes and types of another one."""
    tree, begin = {}, 0
    for name in sorted(like):
        count = like[name].numel()
        part = torch.from_numpy(whole[begin : begin + count].astype(np.float64)) / steps
        tree[name], begin = part.view(like[name].shape).to(like[name].dtype), begin + count
    return tree


def modulo(whole: NDArray[np.int64]) -> Vector:
    """Integers modulo 2^32."""
    return whole.astype(np.uint32)


def signed(total: Vector, addends: int, steps: float) -> NDArray[np.int64]:
    """The sum behind its residue modulo 2^32. Raises SecureSumError for what cannot be one."""
    whole = total.view(np.int32).astype(np.int64)
    most = int(np.abs(whole).max(initial=0))
    if most > 2 * addends * RANGE * steps:
        raise SecureSumError(
            f"a sum of {addends} vectors holds {most / steps:.6g}; a client's was out of range, or "
            "its masks were not those that it has agreed on"
        )
    return whole


def require_enough(names: Collection[str], needed: int, what: str) -> None:
    """SecureSumError for fewer clients than a secure sum needs."""
    if len(names) < needed:
        raise SecureSumError(f"only {len(names)} clients {what}, but {needed} are needed")
