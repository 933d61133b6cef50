"""A request while it is answered, between the engine's tokens and what is sent."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

from fedalt.serving.engine import End, Request
from fedalt.serving.errors import ApiError
from fedalt.serving.text import Text

Written = asyncio.Queue[tuple[int | None, End | None]]
_FAILED: Final[Mapping[str | None, tuple[int, str, str]]] = {
    "late": (503, "the request waited as long as a request may take", "timeout"),
    "failed": (500, "the server failed and ends", "internal_error"),
}


@dataclass(eq=False)
class Answer:
    """A request that is being answered: its tokens come as they are written."""

    request: Request
    text: Text
    written: Written
    end: str = ""

    async def pieces(self) -> AsyncIterator[str]:
        """The text in pieces. Raises ApiError where there is none."""
        while not self.end:
            token, end = await self.written.get()
            if end in _FAILED:
                raise ApiError(*_FAILED[end])
            assert token is not None
            piece = self.text.add(token, last=end is not None)
            if self.text.stopped:
                self.request.gone, end = True, "stop"
            self.end = end or ""
            yield piece

    @property
    def usage(self) -> dict[str, int]:
        """How many tokens were read and written."""
        read, written = len(self.request.prompt), len(self.text.ids)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }
