"""A message as the change of one that its receiver has, in few bits a number."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import ClassVar

import torch
from torch import Tensor

from fedalt.core.quantise import Kind, Shapes, pack, unpack
from fedalt.core.seeds import generator
from fedalt.core.tree import Name, Tree
from fedalt.engine.firewall import quoted
from fedalt.methods.contract import Facts, Message


@dataclass(frozen=True)
class Change:
    """A message whose tree is sent as the change of one that the receiver has.

    `reference` is the digest of that one, `tree` the change as `quantise.pack` writes it.
    """

    TAG: ClassVar = "traffic/change"

    kind: Kind
    reference: str
    tree: Tree
    facts: Facts = field(default_factory=dict)


Sent = Message | Change


@dataclass(frozen=True)
class Known:
    """A tree that sender and receiver have, bit for bit; the digest of an empty one is ""."""

    TAG: ClassVar = "traffic/known"

    tree: Tree
    digest: str

    @staticmethod
    def of(tree: Tree) -> "Known":
        """The tree with its digest."""
        return Known(tree, digest_of(tree))


def whole(sent: Sent) -> Message:
    """The message itself, where it is known to be one."""
    assert isinstance(sent, Message)
    return sent


class ReferenceLackedError(ValueError):
    """A change of something that is not here; the message has to be sent in full."""


def digest_of(tree: Tree) -> str:
    """What tells trees apart, by names, types, shapes and all bits; "" for an empty one."""
    digest = sha256()
    for name in sorted(tree):
        tensor = tree[name].detach().cpu().contiguous()
        digest.update(repr((*name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()[:32] if tree else ""


def change_of(message: Message, known: Known, kind: Kind, *seed: str | int) -> Change:
    """A message as a change; the seed and the reference decide how it is rounded."""
    change = {
        name: tensor - known.tree[name] if has(known.tree, name, tensor) else tensor
        for name, tensor in message.tree.items()
    }
    packed = pack(change, kind, generator(*seed, known.digest))
    return Change(kind, known.digest, packed, message.facts)


def message_of(
    change: Change, known: Known, check: Callable[[Shapes], None] = lambda _: None
) -> Message:
    """What a change makes of its reference. Raises ReferenceLackedError and CodecError.

    `check` is told names and shapes before numbers are read.
    """
    if change.reference != known.digest:
        raise ReferenceLackedError(
            f"a change of {quoted(change.reference)}, but the reference here is {known.digest!r}"
        )
    steps = unpack(change.tree, change.kind, check)
    tree = {
        name: known.tree[name] + step if has(known.tree, name, step) else step
        for name, step in steps.items()
    }
    return Message(tree, change.facts)


def has(tree: Mapping[Name, Tensor], name: Name, like: Tensor) -> bool:
    """Whether a tree has a tensor of this name and of the shape of `like`."""
    return name in tree and tree[name].shape == like.shape
