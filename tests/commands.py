"""Calling the command line from a test."""

import pytest

from fedalt.cli import main


def call(*words: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert isinstance(end.value.code, int)
    return end.value.code
