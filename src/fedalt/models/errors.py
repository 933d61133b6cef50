"""The error of a base model, and a library's message as one line."""

import textwrap


class ModelError(ValueError):
    """A base model or tokenizer that cannot be used, and why."""


def in_short(error: BaseException) -> str:
    """One line: some of transformers' messages list every tensor or every architecture."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
