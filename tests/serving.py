"""A real `fedalt serve` process, and OpenAI's own client."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI


class Server:
    """A process that serves; `said` is what it has printed so far."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedalt", "serve", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        self.said = ""
        self._heard = threading.Condition()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.said += line
                self._heard.notify_all()

    def wait_for(self, text: str, seconds: float = 240) -> str:
        """All that was said, once it holds a text."""
        with self._heard:
            ended = not self._heard.wait_for(lambda: text in self.said, seconds)
            assert not ended, self.said
            return self.said

    @property
    def url(self) -> str:
        """Where it answers, without /v1."""
        found = re.search(r"(http://\S+)/v1 answers", self.wait_for("answers for"))
        assert found is not None
        return found[1]

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code, after a signal."""
        self.process.send_signal(how)
        code = self.process.wait(240)
        self._thread.join(10)
        return code

    def client(self, token: str = "none") -> OpenAI:
        """OpenAI's client for it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120)


@contextmanager
def serving(path: Path, *words: object) -> Iterator[Server]:
    """A server for the time of the block, at a free port."""
    server = Server(path, "--port", 0, *words)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
