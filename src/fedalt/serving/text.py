"""The text of an answer while it is written: what can be told already, and where it stops."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from fedalt.data.answers import without_end
from fedalt.evaluation.asking import ends
from fedalt.models.base import Base

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


def _begun(text: str, stop: str) -> int:
    """How much of a text's end may be the beginning of a stop sequence."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
