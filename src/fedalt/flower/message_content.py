"""Bytes of our codec as the content of a Flower message, and back."""

from collections.abc import Iterator
from typing import Final

from flwr.app import ConfigRecord, RecordDict

from fedalt.core.header import head_length

CHUNK: Final = 16 * 2**20  # bytes; Flower moves every record by itself
_KIND: Final = "fedalt"
_WORTH: Final = 2**16  # bytes of tensors that are worth a record of their own


def content_of(data: bytes) -> RecordDict:
    """A record of records that hold the bytes in pieces.

    Flower keeps equal records once: the tensors, which calls to many clients often have in common,
    are apart from what is said to each. It moves an array as several objects, a request each, and a
    record of settings as one; so these are no arrays.
    """
    content = RecordDict()
    for number, piece in enumerate(_pieces(data)):
        content[f"{_KIND}-{number:06d}"] = ConfigRecord({_KIND: piece})
    return content


def _pieces(data: bytes) -> Iterator[bytes]:
    head = head_length(data)
    begin = head if len(data) - head > _WORTH else 0
    if begin:
        yield data[:begin]
    for first in range(begin, max(len(data), 1), CHUNK):
        yield data[first : first + CHUNK]


def bytes_of(content: RecordDict, most: int | None = None) -> bytes:
    """The bytes that `content_of` has put in; ValueError for a record that is not one of ours.

    Of more than `most` one byte too many is returned: a record may name one large piece often.
    """
    pieces, size = [], 0
    for name in sorted(content):
        record = content[name]
        piece = record.get(_KIND) if isinstance(record, ConfigRecord) else None
        if not isinstance(piece, bytes):
            raise ValueError(f"expected pieces called {_KIND!r}, got a record {name[:40]!r}")
        pieces.append(piece)
        size += len(piece)
        if most is not None and size > most:
            pieces[-1] = piece[: len(piece) - (size - most - 1)]
            break
    return b"".join(pieces)
