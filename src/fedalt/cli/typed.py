"""What a user types or pipes into a command, as lines of text in UTF-8."""

import sys
from collections.abc import Iterator


def piped_lines() -> list[str]:
    """All lines of a file or pipe without the space at their ends; DataError if not UTF-8."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # Python's own caller has put a text stream in its place
        return [line.strip() for line in sys.stdin]
    # Only line ends part questions: other separators of Unicode may stand within one.
    return [line.strip() for line in _text(stream.read()).split("\n")]


def next_lines(prompt: str) -> Iterator[str]:
    """What is typed or piped, line by line, until an empty one or the end. DataError likewise."""
    stream = None if sys.stdin.isatty() else getattr(sys.stdin, "buffer", None)
    while True:
        try:
            if stream is None:
                line = input(prompt if sys.stdin.isatty() else "").strip()
            else:
                line = _text(stream.readline()).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            line = _text(error.object)
        if not line:
            return
        yield line


def _text(raw: bytes) -> str:
    from fedalt.data.encodings import EncodingError, decoded
    from fedalt.data.records import DataError

    try:
        return decoded(raw)
    except EncodingError as error:
        raise DataError(f"standard input: {error}") from None
