"""A request while it is answered, between the engine's tokens and the text that is sent."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedalt.data.answers import without_end
from fedalt.evaluation.asking import ends
from fedalt.models.base import Base
from fedalt.serving.engine import End, Request
from fedalt.serving.errors import ApiError

Written = asyncio.Queue[tuple[int | None, End | None]]
FAILED: Final[Mapping[str | None, tuple[int, str, str]]] = {
    "late": (503, "the request waited as long as a request may take", "timeout"),
    "failed": (500, "the server failed and ends", "internal_error"),
}
_PART_OF_A_SIGN: Final = "\ufffd"


@dataclass
class Text:
    """Tokens of an answer as text that nothing to come can change.

    `stops` end it and are no part of it. A `stripped` answer has no space at its ends, as
    `fedalt generate` writes it.
    """

    base: Base
    stops: Sequence[str] = ()
    stripped: bool = True
    ids: list[int] = field(default_factory=list)
    told: str = ""
    stopped: bool = False

    def add(self, token: int, *, last: bool) -> str:
        """What can be told now that has not been told; of the last token all that is left."""
        self.ids.append(token)
        # No other token can be one that ends an answer.
        kept = without_end(self.ids, self.base.tokenizer, ends(self.base)) if last else self.ids
        text = str(self.base.tokenizer.decode(kept, skip_special_tokens=True))
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not last:
            text = text.rstrip(_PART_OF_A_SIGN)  # before what it may turn out to be is held back
            held = max((_begun(text, stop) for stop in self.stops), default=0)
            text = text[: len(text) - held]
        new = (text.strip() if self.stripped else text)[len(self.told) :]
        self.told += new
        return new


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
            if end in FAILED:
                raise ApiError(*FAILED[end])
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


def _begun(text: str, stop: str) -> int:
    """How much of a text's end may be the beginning of a stop sequence."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
