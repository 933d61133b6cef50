"""Text that a user gives, as UTF-8; of anything else one sentence that names what it looks like."""

import codecs
from typing import Final

BOM: Final = codecs.BOM_UTF8
_OTHER_BOMS: Final = (  # the longer ones first: UTF-16's begins UTF-32's
    (codecs.BOM_UTF32_LE, "UTF-32 (little-endian)"),
    (codecs.BOM_UTF32_BE, "UTF-32 (big-endian)"),
    (codecs.BOM_UTF16_LE, "UTF-16 (little-endian)"),
    (codecs.BOM_UTF16_BE, "UTF-16 (big-endian)"),
)
_FEWEST: Final = 4  # bytes by which an encoding without a mark is recognised


class EncodingError(ValueError):
    """Bytes that are no UTF-8; the text says where and what they look like."""


def decoded(raw: bytes) -> str:
    """UTF-8 bytes as text without a byte order mark. Raises EncodingError."""
    if (wide := wide_encoding(raw)) is not None:
        raise EncodingError(f"the text is {wide}; save it as UTF-8")
    try:
        return raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        raise EncodingError(
            f"byte {column} of line {line} is not UTF-8; {narrow_encoding(raw)}; save it as UTF-8"
        ) from None


def wide_encoding(begin: bytes) -> str | None:
    """The name of an encoding with two or four bytes a character, if bytes begin like it."""
    for mark, name in _OTHER_BOMS:
        if begin.startswith(mark):
            return name
    whole = begin[: len(begin) // 4 * 4]
    if len(whole) < _FEWEST or b"\0" not in whole:
        return None
    # Most signs of any text, spaces and line ends at the least, have zeros in their upper bytes.
    zeros = [whole[at::4].count(0) / (len(whole) / 4) for at in range(4)]
    even, odd = (zeros[0] + zeros[2]) / 2, (zeros[1] + zeros[3]) / 2
    if min(zeros[2], zeros[3]) > 0.9 and zeros[0] < 0.5:
        return _OTHER_BOMS[0][1]
    if min(zeros[0], zeros[1]) > 0.9 and zeros[3] < 0.5:
        return _OTHER_BOMS[1][1]
    if odd > 0.5 and even < 0.1:
        return _OTHER_BOMS[2][1]
    if even > 0.5 and odd < 0.1:
        return _OTHER_BOMS[3][1]
    return None


def narrow_encoding(raw: bytes) -> str:
    """What bytes that are no UTF-8 may be instead, in half a sentence."""
    letters = [byte for byte in raw if byte >= 0x80 or chr(byte).isalpha()]
    high = sum(byte >= 0x80 for byte in letters)
    if b"\0" in raw:
        return "it looks like no text at all"
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return "it looks like an older encoding of one language, such as Shift JIS or Windows-1251"
    if high > len(letters) / 2 and high > _FEWEST:
        return "it looks like an older encoding of one language, such as Windows-1251"
    return "it looks like Windows-1252 (cp1252)"
