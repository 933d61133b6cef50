"""Calling the command line from a test."""

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import IO

import pytest

from fedalt.cli import main


def call(*words: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert isinstance(end.value.code, int)
    return end.value.code


class InThisProcess:
    """Stands for the process of a run that a comparison starts: the same words, called here.

    Loading Python and PyTorch takes many times as long as a tiny run. One job at a time.
    """

    def __init__(self, words: list[str], *, stdout: IO[bytes], stderr: IO[bytes], env: object):
        assert stdout is stderr
        assert words[:3] == [sys.executable, "-m", "fedalt"]
        log = TextIOWrapper(stdout, write_through=True)
        with redirect_stdout(log), redirect_stderr(log):
            self.code = call(*words[3:])
        log.detach()  # whoever opened the file closes it

    def wait(self) -> int:
        return self.code

    poll = wait
