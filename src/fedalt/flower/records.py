"""Bytes of our codec as the content of a Flower message, and back."""

from typing import Final

from flwr.app import Array, ArrayRecord, RecordDict

CHUNK: Final = 16 * 2**20  # bytes; Flower moves every array by itself
_KIND: Final = "fedalt"


def content_of(data: bytes) -> RecordDict:
    """A record whose arrays hold the bytes in pieces."""
    pieces = [data[first : first + CHUNK] for first in range(0, max(len(data), 1), CHUNK)]
    arrays = {
        f"{number:06d}": Array("uint8", (len(piece),), _KIND, piece)
        for number, piece in enumerate(pieces)
    }
    return RecordDict({_KIND: ArrayRecord(arrays)})


def bytes_of(content: RecordDict, most: int | None = None) -> bytes:
    """The bytes that `content_of` has put in; ValueError for a record that is not one of ours.

    Of more than `most` one byte too many is returned: a record may name one large array often.
    """
    record = content.get(_KIND)
    if set(content) != {_KIND} or not isinstance(record, ArrayRecord):
        raise ValueError(f"expected one record called {_KIND!r}, got {sorted(content)[:3]}")
    whole = bytearray()
    for name in sorted(record):
        whole += record[name].data
        if most is not None and len(whole) > most:
            return bytes(whole[: most + 1])
    return bytes(whole)


def text_of(key: str | bytes) -> str:
    """A public key of Flower's list of nodes, as text."""
    return key.decode() if isinstance(key, bytes) else key
