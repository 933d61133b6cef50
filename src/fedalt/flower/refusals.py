"""What was refused to strangers: counted by kind and reported once a minute."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

_REPORT: Final = 60.0  # seconds between two lines of one kind


@dataclass
class Refusals:
    """What was refused since the last report: how often of each kind, and from where.

    A kind never holds anything that a stranger has written, so there are few.
    """

    counts: dict[str, int] = field(default_factory=dict)
    last_from: dict[str, str] = field(default_factory=dict)

    def count(self, kind: str, address: str | None = None) -> None:
        """One more, from a host's address where that is known."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if address is not None:
            self.last_from[kind] = address

    def report(self) -> None:
        """Print a line for each kind, and begin anew."""
        now = datetime.now().isoformat(" ", "seconds")
        for kind, count in self.counts.items():
            line = {"time": now, "refused": count, "what": kind}
            print(json.dumps({**line, "last_from": self.last_from.get(kind, "")}), flush=True)
        self.counts.clear()
        self.last_from.clear()

    @asynccontextmanager
    async def reporting(self, _: object) -> AsyncIterator[None]:
        """Report once a minute while an application runs, and at its end."""

        async def report_often() -> None:
            while True:
                await asyncio.sleep(_REPORT)
                self.report()

        task = asyncio.create_task(report_often())
        yield
        task.cancel()
        self.report()

    def is_other(self, record: logging.LogRecord) -> bool:
        """Count what uvicorn warns of, which is what strangers send; all else goes to the log.

        Of its errors of one kind the first between two reports goes there, with its traceback.
        """
        if record.levelno < logging.WARNING:
            return True
        kind = str(record.msg).strip()
        is_news = record.levelno > logging.WARNING and kind not in self.counts
        self.count(kind)
        return is_news

    def count_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What nobody has caught of a connection, as an event loop's exception handler."""
        error = context.get("exception")
        kind = f"{context['message']}: {type(error).__name__}"
        if kind not in self.counts and not isinstance(error, OSError):
            loop.default_exception_handler(context)
        self.count(kind)
