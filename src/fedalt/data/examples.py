"""One example as the model sees it: ids, where the answer begins, and what counts as right."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["generate", "classify"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """A tokenised example.

    `ids` are prompt and answer; the answer, with the end-of-text token behind it where it fits,
    begins at `answer_start`. `answer` is its text, `options` the texts to choose from (empty for
    free text). For a classifier `ids` are the text, `answer_start` is its length, `options` the
    names of all labels and `label` the index of the right one.
    """

    ids: tuple[int, ...]
    answer_start: int
    answer: str
    options: tuple[str, ...] = ()
    label: int | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What comes before the answer."""
        return self.ids[: self.answer_start]
